#include "isa.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

namespace expertshare {
namespace {

#if defined(__x86_64__) || defined(__i386__)
// Also asks the operating system whether it saves the wide registers.
#define EXPERTSHARE_HAS(feature) (__builtin_cpu_supports(feature) != 0)
bool avx_vnni() {  // leaf 7, subleaf 1: not every compiler has a name for it
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1u) != 0;
}
#else
#define EXPERTSHARE_HAS(feature) false
bool avx_vnni() { return false; }
#endif
bool always() { return true; }
bool has_avx2() { return EXPERTSHARE_HAS("avx2") && EXPERTSHARE_HAS("fma") && EXPERTSHARE_HAS("f16c"); }
bool has_avx_vnni() { return has_avx2() && avx_vnni(); }
bool has_avx512() {
    return has_avx2() && EXPERTSHARE_HAS("avx512f") && EXPERTSHARE_HAS("avx512bw") && EXPERTSHARE_HAS("avx512dq") &&
           EXPERTSHARE_HAS("avx512vl");
}
bool has_avx512_vnni() { return has_avx512() && EXPERTSHARE_HAS("avx512vnni"); }
bool has_avx512_bf16() { return has_avx512_vnni() && EXPERTSHARE_HAS("avx512bf16"); }

struct Isa {
    const char *name;
    bool (*on_this_processor)();
    const Kernels *const &float32, *const &bfloat16, *const &quantised;
    const RouterKernels *const &router;
    const NormPair *const &norm;
};

const Isa isas[] = {
    {"avx512_bf16", has_avx512_bf16, float32_avx512, bfloat16_avx512_bf16, quantised_avx512_vnni, router_avx512_bf16,
     norm_avx512},
    {"avx512_vnni", has_avx512_vnni, float32_avx512, bfloat16_avx512, quantised_avx512_vnni, router_avx512,
     norm_avx512},
    {"avx512", has_avx512, float32_avx512, bfloat16_avx512, quantised_avx2, router_avx512, norm_avx512},
    {"avx_vnni", has_avx_vnni, float32_avx2, bfloat16_avx2, quantised_avx_vnni, router_avx2, norm_avx2},
    {"avx2", has_avx2, float32_avx2, bfloat16_avx2, quantised_avx2, router_avx2, norm_avx2},
    {"portable", always, float32_portable, bfloat16_portable, quantised_portable, router_portable, norm_portable},
};

Format format_of(const es_weight &weight) {
    if (weight.bits == 8) return kInt8;
    if (weight.bits == 4 && weight.group_size == 32) return weight.minima == nullptr ? kInt4By32 : kInt4By32Minima;
    if (weight.bits == 4 && weight.group_size == 64) return weight.minima == nullptr ? kInt4By64 : kInt4By64Minima;
    return kNumFormats;
}

}  // namespace

int num_isas() { return static_cast<int>(sizeof isas / sizeof isas[0]); }

const char *isa_name(int isa) { return isas[isa].name; }

bool isa_usable(int isa) {
    if (isa < 0 || isa >= num_isas()) return false;
    const Isa &known = isas[isa];
    return known.float32 != nullptr && known.bfloat16 != nullptr && known.quantised != nullptr &&
           known.router != nullptr && known.norm != nullptr && known.on_this_processor();
}

const Kernels *kernels_for(int isa, bool is_bfloat16) {
    if (!isa_usable(isa)) return nullptr;
    return is_bfloat16 ? isas[isa].bfloat16 : isas[isa].float32;
}

const Kernels *kernels_for(int isa, bool is_bfloat16, const es_weight &weight) {
    if (weight.bits == (is_bfloat16 ? 16 : 32)) return kernels_for(isa, is_bfloat16);
    if (!isa_usable(isa)) return nullptr;
    const int format = format_of(weight);
    return format == kNumFormats ? nullptr : isas[isa].quantised + 2 * format + (is_bfloat16 ? 1 : 0);
}

const RouterKernels *router_kernels_for(int isa) { return isa_usable(isa) ? isas[isa].router : nullptr; }

const NormKernels *norm_kernels_for(int isa, bool is_bfloat16) {
    if (!isa_usable(isa)) return nullptr;
    return is_bfloat16 ? &isas[isa].norm->bfloat16 : &isas[isa].norm->float32;
}

}  // namespace expertshare
