// Compiled instead of a family's source where the compiler does not know an instruction set (setup.py): its table is
// null.
#include "kernels.h"

decltype(expertshare::EXPERTSHARE_ABSENT) expertshare::EXPERTSHARE_ABSENT = nullptr;
