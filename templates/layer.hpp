// Entry of an instance: picks the back end that the shape names.
#pragma once
#include "backward.hpp"
#include "gemm/ref.hpp"
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

template <Shape S>
auto gemm_of() {
  check_shape<S>();
  if constexpr (S.isa == Isa::ref) return GemmRef<S>{};
#ifdef __AVX2__
  if constexpr (S.isa == Isa::avx2) return GemmAvx2<S>{};
#endif
#ifdef __AVX512F__
  if constexpr (S.isa == Isa::avx512) return GemmAvx512<S>{};
#endif
#ifdef __AVX512BF16__
  if constexpr (S.isa == Isa::avx512_bf16) return GemmAvx512Bf16<S>{};
#endif
#ifdef __AMX_BF16__
  if constexpr (S.isa == Isa::amx) return GemmAmx<S>{};
#endif
}

template <Shape S>
void forward(const Call& call) {
  using Gemm = decltype(gemm_of<S>());
  run<S, Gemm>(call, forward_group<S, Gemm>);
}

template <Shape S>
void backward(const Call& call) {
  using Gemm = decltype(gemm_of<S>());
  run<S, Gemm>(call, backward_group<S, Gemm>);
}

}  // namespace jitmoe
