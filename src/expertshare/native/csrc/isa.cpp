#include "isa.h"

namespace expertshare {
namespace {

// __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
#if defined(__x86_64__) || defined(__i386__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
#endif
bool always() { return true; }

struct Isa {
    const char *name;
    bool (*on_this_processor)();
    const Kernels *const *bfloat16;
    const Kernels *const *float32;
};

const Isa isas[] = {
    {"avx512_bf16", has_avx512_bf16, &avx512_bf16_bfloat16, &avx512_float32},
    {"avx512", has_avx512, &avx512_bfloat16, &avx512_float32},
    {"avx2", has_avx2, &avx2_bfloat16, &avx2_float32},
    {"portable", always, &portable_bfloat16, &portable_float32},
};

}  // namespace

int num_isas() { return static_cast<int>(sizeof isas / sizeof isas[0]); }

const char *isa_name(int isa) { return isas[isa].name; }

bool isa_usable(int isa) {
    if (isa < 0 || isa >= num_isas()) return false;
    const Isa &known = isas[isa];
    return *known.bfloat16 != nullptr && *known.float32 != nullptr && known.on_this_processor();
}

const Kernels *kernels_for(int isa, bool is_bfloat16) {
    if (!isa_usable(isa)) return nullptr;
    return is_bfloat16 ? *isas[isa].bfloat16 : *isas[isa].float32;
}

}  // namespace expertshare
