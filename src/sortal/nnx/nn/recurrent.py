"""Recurrent cells and RNN, by NNX's module name."""

from sortal.nn.recurrent import *  # noqa: F403
from sortal.nn.rnn import RNN as RNN
from sortal.nn.rnn import Bidirectional as Bidirectional
from sortal.nn.rnn import flip_sequences as flip_sequences
