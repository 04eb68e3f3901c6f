// Included before every file that test_mutations.py compiles: the number of the active mutation, 0 for none.
#pragma once

extern "C" __attribute__((weak, visibility("default"))) int ercn_mutation;
int ercn_mutation = 0;
