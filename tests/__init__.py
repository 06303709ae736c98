"""Tests of all that test_spul.py leaves out. This file comes before anything that imports torch."""

import os

GPU = dict(os.environ)  # for the one test that takes one
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: what is exact here is so on a CPU
