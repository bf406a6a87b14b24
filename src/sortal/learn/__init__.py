"""The course behind ``sortal learn``: twenty problems, and a judge of answers."""

from sortal.learn.judging import Verdict as Verdict
from sortal.learn.judging import judge as judge
from sortal.learn.lesson import Lesson as Lesson
from sortal.learn.lesson import lessons as lessons
