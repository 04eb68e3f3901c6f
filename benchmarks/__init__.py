"""``ercn bench``: what the operators and the network cost, beside plain torch, with the evidence to judge the number.

Each case (an op, a direction, a shape, a dtype) runs every variant in one process, in turn, on the same random data.
A variant whose output is wrong gets no time.
"""
