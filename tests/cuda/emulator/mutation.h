// Before every file that test_mutations.py compiles: which of its mutations is in force, 0 for none.
#pragma once

extern "C" __attribute__((weak, visibility("default"))) int ercn_mutation;
int ercn_mutation = 0;
