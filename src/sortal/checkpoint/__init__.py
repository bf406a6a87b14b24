"""Checkpoints by kind: save, restore, and a manager of steps."""

from sortal.checkpoint.manager import Checkpoints as Checkpoints
from sortal.checkpoint.pending import Saving as Saving
from sortal.checkpoint.restoring import Restored as Restored
from sortal.checkpoint.restoring import load_state as load_state
from sortal.checkpoint.restoring import restore as restore
from sortal.checkpoint.saving import save as save
