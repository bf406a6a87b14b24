"""Choosing tokens, and generation as a loop of steps or as one program."""

from sortal.decoding.generation import Decoder as Decoder
from sortal.decoding.generation import decode as decode
from sortal.decoding.generation import decode_all as decode_all
from sortal.decoding.generation import generate as generate
from sortal.decoding.generation import pad as pad
from sortal.decoding.generation import prefill as prefill
from sortal.decoding.generation import stream as stream
from sortal.decoding.sampling import NO_TOKEN as NO_TOKEN
from sortal.decoding.sampling import Choice as Choice
from sortal.decoding.sampling import sample as sample
