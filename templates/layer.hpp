// Entry of an instance: picks the back end that the shape names.
#pragma once
#include "backward.hpp"
#include "gemm/ref.hpp"
#include "weights/canonical.hpp"
#ifdef __AVX2__
#include "gemm/avx2.hpp"
#endif
#ifdef __AVX512F__
#include "gemm/avx512.hpp"
#endif
#ifdef __AVX512BF16__
#include "gemm/avx512_bf16.hpp"
#endif
#ifdef __AMX_BF16__
#include "gemm/amx.hpp"
#endif

namespace jitmoe {

// The back end of the shape, if the shape is one and the back end keeps its contract; else says in a sentence what is
// missing. Nothing is instantiated then, so that no other error follows.
template <Shape S>
constexpr bool check_instance() {
  if constexpr (check_shape<S>()) {
    using Gemm = typename BackEndOf<S>::type;
    constexpr bool found = !std::is_same_v<Gemm, NoBackEnd>;
    static_assert(
        found,
        "this shape's isa has no back end here: layer.hpp includes it where the compiler's flags allow");
    if constexpr (found) return check_back_end<Gemm, S>();
  }
  return false;
}

template <Shape S>
void forward(const Call& call) {
  if constexpr (check_instance<S>()) {
    using Gemm = typename BackEndOf<S>::type;
    run<S, Gemm>(call, forward_group<S, Gemm>);
  }
}

template <Shape S>
void backward(const Call& call) {
  if constexpr (check_instance<S>()) {
    using Gemm = typename BackEndOf<S>::type;
    run<S, Gemm>(call, backward_group<S, Gemm>);
  }
}

}  // namespace jitmoe
