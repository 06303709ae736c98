"""Tests of all that test_spul.py leaves out. This file comes before anything that imports torch."""

import os

GPU = dict(os.environ)  # for the one test that takes one
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: what is exact here is so on a CPU
os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest.ini: two tests run side by side
