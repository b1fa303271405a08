#include "abi.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <vector>

#include "attention.h"
#include "expert_layer.h"
#include "isa.h"
#include "norm.h"
#include "projection.h"
#include "routing_step.h"

#define EXPERTSHARE_EXPORT __attribute__((visibility("default")))

namespace expertshare {
namespace {

// Bounds the scratch (about 64 MiB at 2048 features and 8 experts a token); reading the weights once more for every
// so many tokens costs nothing beside the arithmetic of those tokens.
constexpr Index kTokensAtATime = 1024;

// Threads and scratch of the process. One call at a time: two would only fight for the same cores.
class Engine {
   public:
    Engine() {
#if defined(__unix__) || defined(__APPLE__)
        pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
#endif
    }

    // At exit a daemon thread may still be computing; then threads and scratch are left to the operating system.
    ~Engine() {
        if (!mutex_.try_lock()) {
            static_cast<void>(pool_.release());
            return;
        }
        pool_.reset();
        mutex_.unlock();
    }
    es_status run(const es_layer &whole);
    es_status run(const es_step &whole);
    es_status run(const es_projection &whole);
    es_status run(const es_attention &whole);
    es_status run(const es_norm &whole);
    es_status run(const es_heads &whole);

   private:
    template <class Run>
    es_status locked(int num_threads, es_team team, Run run);
    template <class Whole, class Run>
    es_status in_parts(const Whole &whole, Index depth, Run run);
    template <class Piece, class Whole, class Kernel, class... Scratch>
    es_status at_once(const Whole &whole, const Kernel *kernels, Scratch &...scratch);
    Pool *own_threads(int num_threads, es_team team);
    static void before_fork();
    static void after_fork_in_parent();
    static void after_fork_in_child();

    std::mutex mutex_;
    std::unique_ptr<Pool> pool_;
    Arena arena_, step_arena_;
    std::vector<RankingScratch> ranking_;
    bool forked_ = false;
};

Engine &engine() {
    static Engine one;
    return one;
}

void Engine::before_fork() { engine().mutex_.lock(); }
void Engine::after_fork_in_parent() { engine().mutex_.unlock(); }
// A child has none of the threads, and what they waited on must never be touched again. Nor has it those of a team,
// which libgomp would wait for in vain.
void Engine::after_fork_in_child() {
    static_cast<void>(engine().pool_.release());
    engine().forked_ = true;
    engine().mutex_.unlock();
}

struct TeamWork {
    Work &work;
    std::atomic<int> entered{0};
};

void run_in_team(void *data) {
    TeamWork &team = *static_cast<TeamWork *>(data);
    team.work.run(team.entered.fetch_add(1, std::memory_order_relaxed));
}

// A piece of work in the threads of `pool`, or where there is none in a team.
template <class Piece>
void compute(Piece &piece, Pool *pool, int num_threads, es_team team) {
    if (pool != nullptr) {
        pool->run(piece, piece.useful_threads());
    } else if (piece.useful_threads() == 1) {
        piece.run(0);
    } else {  // always the whole team: libgomp would end the threads that a smaller one leaves out
        TeamWork work{piece};
        team(run_in_team, &work, static_cast<unsigned>(num_threads), 0);
    }
}

// Null: the team's are to be used.
Pool *Engine::own_threads(int num_threads, es_team team) {
    if (team != nullptr && !forked_) return nullptr;
    if (pool_ == nullptr || pool_->num_threads() != num_threads) {
        pool_.reset();
        pool_ = std::make_unique<Pool>(num_threads);
    }
    return pool_.get();
}

const char *row_of(const void *rows, Index row, Index depth, int32_t is_bfloat16) {
    return static_cast<const char *>(rows) + row * depth * (is_bfloat16 ? 2 : 4);
}

// run(compute): `compute` runs a piece of work in the threads of this call.
template <class Run>
es_status Engine::locked(int num_threads, es_team team, Run run) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Pool *pool = own_threads(num_threads, team);
    return run([=](auto &piece) { compute(piece, pool, num_threads, team); });
}

// run(part, first token, compute) for kTokensAtATime tokens of `depth` features: a part is the whole with its number of
// tokens and `x` set.
template <class Whole, class Run>
es_status Engine::in_parts(const Whole &whole, Index depth, Run run) {
    return locked(whole.num_threads, whole.team, [&](auto compute) {
        for (Index token = 0; token < whole.num_tokens; token += kTokensAtATime) {
            Whole part = whole;
            part.num_tokens = std::min<Index>(kTokensAtATime, whole.num_tokens - token);
            part.x = row_of(whole.x, token, depth, whole.is_bfloat16);
            const es_status status = run(part, token, compute);
            if (status != ES_OK) return status;
        }
        return ES_OK;
    });
}

es_status Engine::run(const es_layer &whole) {
    const Kernels *to_hidden = kernels_for(whole.isa, whole.is_bfloat16 != 0, whole.gate_up);
    const Kernels *to_out = kernels_for(whole.isa, whole.is_bfloat16 != 0, whole.down);
    if (to_hidden == nullptr || to_out == nullptr) return ES_UNSUPPORTED_ISA;
    return in_parts(whole, whole.hidden, [&](es_layer &part, Index token, auto compute) {
        part.y = const_cast<char *>(row_of(whole.y, token, whole.hidden, whole.is_bfloat16));
        part.ids = whole.ids + token * whole.top_k;
        part.weights = whole.weights + token * whole.top_k;
        ExpertLayer layer(part, *to_hidden, *to_out, arena_);
        if (!layer.ids_in_range()) return ES_BAD_EXPERT_ID;
        compute(layer);
        if (part.waited_ns != nullptr) *part.waited_ns += layer.waited_ns();
        return layer.all_arrived() ? ES_OK : ES_NOT_ARRIVED;
    });
}

es_status Engine::run(const es_step &whole) {
    const RouterKernels *kernels = router_kernels_for(whole.isa);
    if (kernels == nullptr) return ES_UNSUPPORTED_ISA;
    return locked(whole.num_threads, whole.team, [&](auto compute) {
        const Index at_a_time = RoutingStep::groups_at_a_time(whole);
        for (Index group = 0; group < whole.groups; group += at_a_time) {
            const Index num_groups = std::min<Index>(at_a_time, whole.groups - group);
            RoutingStep step(whole, *kernels, group, num_groups, arena_, step_arena_, ranking_);
            compute(step);
        }
        if (whole.active != nullptr) RoutingStep::count(whole);
        return ES_OK;
    });
}

Matrix matrix_of(const es_projection &of) {
    const Index element = of.is_bfloat16 ? 2 : 4, is_float = of.scales == nullptr;
    const auto bytes = [](const void *from) { return static_cast<const char *>(from); };
    return {of.x,    {bytes(of.w), bytes(of.scales), nullptr}, of.num_tokens, of.num_rows, of.depth,
            element, of.depth * (is_float ? element : 1),      is_float ? 0 : static_cast<Index>(sizeof(float))};
}

es_status Engine::run(const es_projection &whole) {
    es_weight table = {};
    table.bits = whole.scales != nullptr ? 8 : whole.is_bfloat16 ? 16 : 32;
    const Kernels *floats = kernels_for(whole.isa, whole.is_bfloat16 != 0);
    const Kernels *products = kernels_for(whole.isa, whole.is_bfloat16 != 0, table);
    if (floats == nullptr || products == nullptr) return ES_UNSUPPORTED_ISA;
    const PassKernels kernels = {*products, *floats};
    return in_parts(whole, whole.depth, [&](es_projection &part, Index token, auto compute) {
        if (whole.y != nullptr) {
            const char *y = row_of(whole.y, token, whole.num_rows, whole.is_bfloat16);
            Linear linear(matrix_of(part), const_cast<char *>(y), kernels, arena_, part.num_threads);
            compute(linear);
        } else {
            const Head::Choice choice = {whole.excluded, whole.num_excluded, whole.ids + token,
                                         whole.probabilities + token};
            Head head(matrix_of(part), choice, kernels, arena_, part.num_threads);
            compute(head);
        }
        return ES_OK;
    });
}

// One piece of work, with what scratch it needs.
template <class Piece, class Whole, class Kernel, class... Scratch>
es_status Engine::at_once(const Whole &whole, const Kernel *kernels, Scratch &...scratch) {
    if (kernels == nullptr) return ES_UNSUPPORTED_ISA;
    return locked(whole.num_threads, whole.team, [&](auto compute) {
        Piece piece(whole, *kernels, scratch...);
        compute(piece);
        return ES_OK;
    });
}

es_status Engine::run(const es_attention &whole) {
    return at_once<Attention>(whole, kernels_for(whole.isa, whole.is_bfloat16 != 0), arena_);
}

es_status Engine::run(const es_norm &whole) {
    return at_once<Norm>(whole, norm_kernels_for(whole.isa, whole.is_bfloat16 != 0));
}

es_status Engine::run(const es_heads &whole) {
    return at_once<Heads>(whole, norm_kernels_for(whole.isa, whole.is_bfloat16 != 0));
}

// -1 where the environment names an instruction set: what the name means, and what is wrong with it, Python knows.
int best_isa() {
    static const int best = [] {
        int isa = 0;
        while (isa < num_isas() - 1 && !isa_usable(isa)) isa++;
        return isa;
    }();
    const char *named = std::getenv("EXPERTSHARE_ISA");
    return named == nullptr || *named == 0 ? best : -1;
}

template <class Call>
int status_of(Call call) {
    if (call.isa < 0) call.isa = best_isa();
    if (call.isa < 0) return ES_ISA_NAMED;
    try {
        return engine().run(call);
    } catch (const std::bad_alloc &) {
        return ES_OUT_OF_MEMORY;
    } catch (const std::system_error &) {
        return ES_NO_THREADS;
    }
}

}  // namespace
}  // namespace expertshare

extern "C" {

EXPERTSHARE_EXPORT int es_abi_version() { return EXPERTSHARE_ABI_VERSION; }
EXPERTSHARE_EXPORT int es_num_isas() { return expertshare::num_isas(); }
EXPERTSHARE_EXPORT const char *es_isa_name(int isa) { return expertshare::isa_name(isa); }
EXPERTSHARE_EXPORT int es_isa_usable(int isa) { return expertshare::isa_usable(isa) ? 1 : 0; }

EXPERTSHARE_EXPORT int es_moe_ffn(const es_layer *layer) { return expertshare::status_of(*layer); }
EXPERTSHARE_EXPORT int es_route(const es_step *step) { return expertshare::status_of(*step); }
EXPERTSHARE_EXPORT int es_project(const es_projection *projection) { return expertshare::status_of(*projection); }
EXPERTSHARE_EXPORT int es_attend(const es_attention *attention) { return expertshare::status_of(*attention); }
EXPERTSHARE_EXPORT int es_normalise(const es_norm *norm) { return expertshare::status_of(*norm); }
EXPERTSHARE_EXPORT int es_turn_heads(const es_heads *heads) { return expertshare::status_of(*heads); }
}
