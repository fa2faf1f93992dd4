"""The seeded bugs: each is put into a scratch copy of the tree, and the tests that are named for it must fail there.

    make mutants                                        all of them
    python tests/mutants.py stale_lora_b ties_away      some
    python tests/mutants.py --list                      what they are

One that survives is a hole in the tests. Each is a slip of a line or so that compiles and runs; many were made in the
ancestor of this library, and those are to be caught by the test of their name in test_ancestor.py.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from mutation import Mutant, MutationError, Outcome, run_mutants

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 240.0
"""Seconds for the tests of one mutant, its kernels compiled among them."""

MUTANTS = (
    Mutant(
        "sums_twice",
        "templates/parallel.hpp",
        "#pragma omp for schedule(dynamic) nowait\n  for (int64_t first = 0; first < strips;",
        "  for (int64_t first = 0; first < strips;",
        ("test_ancestor.py::test_output_doubled_where_partitions_are_summed_twice",),
        "Every thread adds every strip to the token sums.",
    ),
    Mutant(
        "two_writers_of_a_gradient",
        "templates/parallel.hpp",
        "#pragma omp for schedule(dynamic, kNeighbours) nowait\n",
        "",
        ("test_ancestor.py::test_output_doubled_where_partitions_are_summed_twice",),
        "No strip of I belongs to one thread: all add to the gradients of down A, gate B and up B.",
    ),
    Mutant(
        "threads_in_their_own_order",
        "templates/parallel.hpp",
        "    for (int64_t s = 0; s < group.count; ++s)\n      for (int64_t strip = first; strip < end; ++strip) {\n",
        "    for (int64_t n = 0; n < group.count; ++n)\n"
        "      for (int64_t strip = first; strip < end; ++strip) {\n"
        "        const int64_t s = (n + omp_get_thread_num()) % group.count;\n",
        ("test_threads.py::test_same_bits_for_any_number_of_threads_and_every_run",),
        "Each thread begins at an expert of its own, so the order of a token's sum depends on who computes it.",
    ),
    Mutant(
        "shared_lora_scratch",
        "templates/parallel.hpp",
        "lora(part(call.thread_lora)),",
        "lora(call.thread_lora.data),",
        ("test_checked.py::TestNothingElseChanges::test_same_bits",),
        "All threads keep their strip of LoRA in the first one's scratch.",
    ),
    Mutant(
        "barrier_lets_go",
        "templates/barrier.hpp",
        "if (round_.load(std::memory_order_acquire) != round) return;",
        "return;",
        ("test_barrier.py::test_all_are_there",),
        "A thread goes on before the others are there.",
    ),
    Mutant(
        "barrier_wakes_one",
        "templates/barrier.hpp",
        "futex(FUTEX_WAKE_PRIVATE, INT_MAX);",
        "futex(FUTEX_WAKE_PRIVATE, 1);",
        ("test_barrier.py::test_all_are_there",),
        "Of several threads that sleep one wakes up, and the call never ends.",
    ),
    Mutant(
        "float_mode_of_the_caller",
        "templates/parallel.hpp",
        "FloatMode() { _mm_setcsr(kDefault); }",
        "FloatMode() {}",
        ("test_faults_values.py::TestExtremes::test_flush_to_zero_set_by_another_library",),
        "Threads keep the flush-to-zero mode that another library set on one of them.",
    ),
    Mutant(
        "gate_and_up_share_a_strip",
        "templates/backward.hpp",
        "float* ups = strip(3, segment);",
        "float* ups = strip(2, segment);",
        ("test_ancestor.py::test_gradient_of_up_zero_because_gate_and_up_shared_scratch",),
        "dgate and dup are kept in one strip of scratch.",
    ),
    Mutant(
        "base_gradient_lost",
        "templates/pass.hpp",
        "const SumStart from = add ? SumStart::strip(result)",
        "const SumStart from = add && !call.rank ? SumStart::strip(result)",
        ("test_ancestor.py::test_gradient_of_x_without_the_base_where_lora_flows",),
        "With LoRA, up's product begins at zero instead of at gate's, and half of dx is lost.",
    ),
    Mutant(
        "recomputed_the_wrong_way_round",
        "templates/backward.hpp",
        "again_strip(Access::write, call.gate, segment, index),\n"
        "                  again_strip(Access::write, call.up, segment, index),",
        "again_strip(Access::write, call.up, segment, index),\n"
        "                  again_strip(Access::write, call.gate, segment, index),",
        ("test_ancestor.py::test_recomputing_drew_another_dropout_mask",),
        "What backward computes again is not what forward had: gate and up change places.",
    ),
    Mutant(
        "padding_kept",
        "templates/pass.hpp",
        "strip[i] = to_float(saved[i]);\n    clear_padding(strip, rows, columns);\n",
        "strip[i] = to_float(saved[i]);\n",
        ("test_faults_values.py::test_nan_in_the_padding_of_the_weights",),
        "Columns of gate and up behind the last one of I are not cleared.",
    ),
    Mutant(
        "unweighted_gate_gradient",
        "templates/backward.hpp",
        "gates[c] = weight * das[c] * result.by_gate;",
        "gates[c] = das[c] * result.by_gate;",
        ("test_ancestor.py::test_x_kept_in_expert_order_and_read_in_token_order",),
        "dgate lacks the routing weight.",
    ),
    Mutant(
        "weighted_dot",
        "templates/backward.hpp",
        "das[c] = das[c] * a;",
        "das[c] = weight * das[c] * a;",
        ("test_faults_inputs.py::TestOddRoutingWeights",),
        "The gradient of a routing weight has the weight itself as a factor.",
    ),
    Mutant(
        "every_segment_is_the_first",
        "templates/pass.hpp",
        "return &segment == call.segments || (&segment)[-1].expert != segment.expert;",
        "return (void)segment, true;",
        ("test_autograd.py::TestReusedMemory::test_an_expert_in_many_groups_adds_its_gradients",),
        "The rows of an expert in a later group write over its gradients instead of adding to them.",
    ),
    Mutant(
        "no_segment_is_the_first",
        "templates/pass.hpp",
        "return &segment == call.segments || (&segment)[-1].expert != segment.expert;",
        "return (void)segment, false;",
        ("test_autograd.py::TestReusedMemory::test_backwards_in_reverse",),
        "Gradients are added to what lay in the memory.",
    ),
    Mutant(
        "every_a_is_shared",
        "templates/pass.hpp",
        "return one.data == other.data &&",
        "return",
        ("test_matrix.py::test_cut_into_many_groups",),
        "Two tensors A of the same strides are taken for one, so up has gate's low-rank product.",
    ),
    Mutant(
        "saved_product_of_the_other_projection",
        "templates/backward.hpp",
        "const float* up_u = u_rows(call.up, segment);",
        "const float* up_u = u_rows(recomputes() ? call.up : call.gate, segment);",
        ("test_autograd.py::TestReusedMemory::test_an_expert_in_many_groups_adds_its_gradients",),
        "The gradient of up's B is taken with gate's low-rank product, unless it is computed again.",
    ),
    Mutant(
        "gradient_of_x_rounded",
        "templates/backward.hpp",
        "      add_to_tokens(segment, index, dx, false);",
        "      for (int64_t i = 0; i < segment.rows * kStrip; ++i) dx[i] = round_to_bf16(dx[i]);\n"
        "      add_to_tokens(segment, index, dx, false);",
        ("test_faults_values.py::test_sums_are_rounded_once_and_ties_to_even",),
        "Each slot's part of dx is rounded before the sum over the slots, which is rounded again.",
    ),
    Mutant(
        "activation_saved",
        "templates/forward.hpp",
        "store_bf16(gates, segment.rows, gate_to);",
        "for (int64_t i = 0; i < segment.rows * kStrip; ++i) gate_to[i] = to_bf16(silu(gates[i]));",
        ("test_ancestor.py::test_values_before_and_after_the_activation_mixed",),
        "silu(gate) is saved and taken for gate.",
    ),
    Mutant(
        "gate_and_up_swapped",
        "templates/forward.hpp",
        "value(gates[i], ups[i], numbers)",
        "value(ups[i], gates[i], numbers)",
        ("test_ancestor.py::test_gradient_of_up_zero_because_gate_and_up_shared_scratch",),
        "The activation is applied to up.",
    ),
    Mutant(
        "a_of_gate_for_up",
        "templates/pass.hpp",
        "low_rank(P::kU, of.at, v_panel, block, P::kIn, lora(of.at.a, block).along_columns()",
        "low_rank(P::kU, of.at, v_panel, block, P::kIn, lora(P::kDown ? of.at.a : call.gate.a, block).along_columns()",
        ("test_ancestor.py::test_gradient_of_up_zero_because_gate_and_up_shared_scratch",),
        "The low-rank product of up is taken with gate's A.",
    ),
    Mutant(
        "announces_a_read_for_a_write",
        "templates/pass.hpp",
        "float* product = low(Access::write, of, block);",
        "float* product = low(Access::read, of, block);",
        ("test_checked.py::TestNothingElseChanges::test_same_bits",),
        "A step that writes low-rank products says that it reads them.",
    ),
    Mutant(
        "outputs_of_down_too_few",
        "templates/projection.hpp",
        "static constexpr int64_t kOut = kDown ? S.hidden : S.intermediate;",
        "static constexpr int64_t kOut = S.intermediate;",
        ("test_ancestor.py::test_gradient_of_x_without_the_base_where_lora_flows",),
        "Down is taken for a projection from I to I.",
    ),
    Mutant(
        "down_rounded",
        "templates/forward.hpp",
        "    add_to_tokens(segment, index, result, true);",
        "    for (int64_t i = 0; i < segment.rows * kStrip; ++i) result[i] = round_to_bf16(result[i]);\n"
        "    add_to_tokens(segment, index, result, true);",
        ("test_faults_values.py::test_sums_are_rounded_once_and_ties_to_even",),
        "Each slot's part of the result is rounded before the sum over the slots, which is rounded again.",
    ),
    Mutant(
        "stale_odd_column",
        "templates/pass.hpp",
        "        for (int64_t c = S.hidden; c < stride; ++c) rows[row * stride + c] = 0;\n",
        "        (void)row;\n",
        ("test_faults_values.py::test_nan_in_the_scratch",),
        "Gathered rows are not padded with zeros: where columns are taken in pairs, the last one's partner is stale.",
        isa="avx512_bf16",
    ),
    Mutant(
        "gather_beyond_hidden",
        "templates/pass.hpp",
        "call.gather_rows(tokens, S.hidden, call.row_token + block.row, block.rows, 0, S.hidden, rows, stride);",
        "call.gather_rows(tokens, S.hidden, call.row_token + block.row, block.rows, 0, stride, rows, stride);",
        ("test_faults_memory.py::test_no_byte_beyond_any_tensor_is_touched",),
        "The gather reads up to 31 columns of the next token, and beyond the last one.",
        ends_process=True,
    ),
    Mutant(
        "scale_missing",
        "templates/lora.hpp",
        "        const float value = low[r * S.m_step + row] * scale;\n        low[r * S.m_step + row] = value;\n",
        "        const float value = low[r * S.m_step + row];\n        low[r * S.m_step + row] = value * scale;\n",
        ("test_ancestor.py::test_gradient_of_up_zero_because_gate_and_up_shared_scratch",),
        "The gradients of A and B lack LoRA's scale.",
    ),
    Mutant(
        "stale_rows",
        "templates/lora.hpp",
        "Gemm::outer(left, rank, rank, strip, rows, scratch);",
        "Gemm::outer(left, rank, rank, strip, transposed(to) ? round_up(rows, 4) : rows, scratch);",
        ("test_ancestor.py::test_stale_rows_of_an_earlier_batch_leak_into_sums",),
        "The gradients of B sum rows in fours, with those behind the last one as they are.",
    ),
    Mutant(
        "last_group_wins",
        "templates/lora.hpp",
        "  if (from.first) return;\n",
        "  if (from.first || !transposed(from)) return;\n",
        ("test_matrix.py::test_cut_into_many_groups",),
        "The gradients of A begin at zero in every group of rows.",
    ),
    Mutant(
        "strides_of_lora_ignored",
        "templates/lora.hpp",
        "        row(matrices.row),\n        column(matrices.column) {}",
        "        row(matrices.row),\n        column(1) {}",
        ("test_lora_views.py::test_values_of_any_strides",),
        "A LoRA matrix is read as if its columns were neighbours.",
    ),
    Mutant(
        "strides_of_lora_gradients_ignored",
        "templates/lora.hpp",
        "+ expert * grad.expert + row * grad.row, grad.column, grad.row, lanes, first};",
        "+ expert * grad.expert + row * grad.row, 1, grad.row, lanes, first};",
        ("test_lora_views.py::test_gradients_of_any_strides",),
        "The gradient of B is written as if its ranks were neighbours.",
    ),
    Mutant(
        "transposed_where_nothing_is_a_neighbour",
        "templates/lora.hpp",
        "grad.rank_stride == 1 && grad.lane_stride != 1;",
        "grad.lane_stride != 1;",
        ("test_lora_views.py::test_gradients_of_any_strides",),
        "A gradient with strides on both axes is taken for one whose ranks are neighbours.",
    ),
    Mutant(
        "first_256_columns",
        "templates/gemm/pack.hpp",
        "tile < strip_elements / kTileElements; ++tile)",
        "tile < smaller(strip_elements / kTileElements, 2 * 256 / kKStep); ++tile)",
        ("test_ancestor.py::test_only_the_first_256_columns_packed",),
        "Weights are packed and unpacked up to column 256.",
    ),
    Mutant(
        "nibbles_in_the_wrong_order",
        "templates/weights/canonical.hpp",
        "return column % 2 ? row[column / 2] >> 4 : row[column / 2] & 0xf;",
        "return column % 2 ? row[column / 2] & 0xf : row[column / 2] >> 4;",
        ("test_formats.py::test_every_code_with_every_kind_of_scale",),
        "The even input is taken from the high nibble.",
    ),
    Mutant(
        "squares_of_whole_blocks_only",
        "templates/weights/layout.hpp",
        "if (kSquares) return ceil_div(in, kBlocksOfScale * kKStep);",
        "if (kSquares) return in / (kBlocksOfScale * kKStep) + 1;",
        ("test_formats.py::test_the_planner_knows_the_bytes_of_the_kernels",),
        "Where the inputs are a multiple of 128, a row of scales is one too long.",
    ),
    Mutant(
        "scale_of_the_first_square",
        "templates/weights/layout.hpp",
        "return strip / kBlocksOfScale * columns + block / kBlocksOfScale;",
        "return strip / kBlocksOfScale * columns;",
        ("test_formats.py::test_round_trip_of_every_size",),
        "All inputs of an output have the scale of its first 128.",
    ),
    Mutant(
        "scales_of_the_wrong_strip_in_backward",
        "templates/weights/decode.hpp",
        "L::scale_at(strip + (down ? index : 0), column + (down ? 0 : index), scale_columns);",
        "L::scale_at(strip, column + (down ? 0 : index), scale_columns);",
        ("test_formats.py::test_few_and_many_rows",),
        "Backward takes the scales of the first strip for all of them.",
    ),
    Mutant(
        "denormal_codes_are_zero",
        "templates/weights/codes.hpp",
        "const float subnormal = static_cast<float>(mantissa) * 0x1p-9f;",
        "const float subnormal = 0.0f * static_cast<float>(mantissa);",
        ("test_formats.py::test_every_code_with_every_kind_of_scale",),
        "The denormals of E4M3 are zero, where the scalar decoder meets them.",
    ),
    Mutant(
        "zero_scaled_by_its_exponent",
        "templates/weights/decode_avx512.hpp",
        "lines[n][0] = _mm512_mask_add_epi16(unscaled, nonzero, unscaled, exponents);",
        "lines[n][0] = _mm512_mask_add_epi16(unscaled, nonzero | 1u, unscaled, exponents);",
        ("test_formats.py::test_every_code_with_every_kind_of_scale",),
        "A code of zero becomes 2^-127 times its scale.",
        isa="avx512",
    ),
    Mutant(
        "denormal_weights_flushed",
        "templates/weights/decode_vectors.hpp",
        "V::kFlushes ? kLeastScale : 0.0f",
        "0.0f",
        ("test_formats.py::test_every_code_with_every_kind_of_scale",),
        "Weights that are denormals are left to an instruction that flushes them.",
        isa="avx512_bf16",
    ),
    Mutant(
        "silu_coefficient",
        "templates/activation.hpp",
        "4.1665795894e-2f",
        "4.2082453853e-2f",
        ("test_ancestor.py::test_silu_evaluated_wrongly",),
        "A coefficient of the polynomial in silu is 1 % too large.",
    ),
    Mutant(
        "clamp_without_its_slope",
        "templates/activation.hpp",
        "up_held ? 0.0f : inner.by_up",
        "inner.by_up",
        ("test_activation.py::test_both_passes_keep_the_error_rule",),
        "up has a slope beyond its clamp.",
    ),
    Mutant(
        "bias_lost_in_the_gradient_of_a_weight",
        "templates/backward.hpp",
        "float sum = S.bias ? grad : 0.0f;",
        "float sum = 0.0f;",
        ("test_activation.py::test_both_passes_keep_the_error_rule",),
        "The gradient of a routing weight lacks the bias of down.",
    ),
    Mutant(
        "activation_derivative",
        "templates/activation.hpp",
        "(1.0f + gate * (1.0f - s))",
        "(1.0f - gate * (1.0f - s))",
        ("test_ancestor.py::test_silu_evaluated_wrongly",),
        "The derivative of silu has a wrong sign, and its value is right.",
    ),
    Mutant(
        "bias_of_the_first_row",
        "templates/gemm/interface.hpp",
        "return {bias, 0};",
        "return {bias, kStrip};",
        ("test_back_end.py::test_sums_start_from_zeros_a_bias_or_a_strip",),
        "A bias is read as if each row had its own.",
    ),
    Mutant(
        "start_of_the_first_block",
        "templates/gemm/interface.hpp",
        "from + blocks.begin(block) * stride",
        "from",
        ("test_back_end.py::test_sums_start_from_zeros_a_bias_or_a_strip",),
        "Every row block begins its sums as the first one does.",
    ),
    Mutant(
        "nan_rounded",
        "templates/bf16.hpp",
        "return (bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded;",
        "return rounded;",
        ("test_faults_values.py::TestExtremes::test_a_nan_of_any_payload_stays_one",),
        "Rounding to bfloat16 turns some NaNs into zero or infinity.",
    ),
    Mutant(
        "ties_away",
        "templates/bf16.hpp",
        "bits + 0x7fff + ((bits >> 16) & 1)",
        "bits + 0x8000",
        ("test_faults_values.py::test_sums_are_rounded_once_and_ties_to_even",),
        "Ties are rounded away from zero instead of to even.",
    ),
    Mutant(
        "whole_last_k_step_of_pairs",
        "templates/gemm/avx512_bf16.hpp",
        "const int64_t here = smaller(kKStep, k - block * kKStep);",
        "const int64_t here = kKStep;",
        ("test_ancestor.py::test_nan_crosses_from_row_to_row_in_a_tail_of_k",),
        "The last K-step is always 32 columns.",
        isa="avx512_bf16",
    ),
    Mutant(
        "rows_of_another_strip",
        "templates/gemm/avx512_bf16.hpp",
        "V::load_some(values, inside ? lefts : 0)",
        "V::load_some(values, lefts)",
        ("test_faults_memory.py::test_no_byte_beyond_any_buffer_of_scratch_is_touched",),
        "Rows behind the last one of a strip are read, and those behind the last strip are nobody's.",
        isa="avx512_bf16",
        ends_process=True,
    ),
    Mutant(
        "whole_last_k_step",
        "templates/gemm/f32.hpp",
        "smaller(count * kKStep, k - first * kKStep)",
        "count * kKStep",
        ("test_ancestor.py::test_nan_crosses_from_row_to_row_in_a_tail_of_k",),
        "The last K-step is always 32 columns.",
        isa="avx2",
    ),
    Mutant(
        "gradient_of_x_as_bfloat16",
        "jitmoe/experts/passes.py",
        "piece.fields |= _result(x_grad)",
        'piece.fields |= {"result": x_grad.data_ptr()}',
        ("test_ancestor.py::test_gradient_of_x_taken_for_another_dtype",),
        "The gradient of a float32 x is written as bfloat16.",
    ),
    Mutant(
        "x_in_expert_order",
        "jitmoe/experts/ops.py",
        "kept = (x, topk_ids.clone(),",
        "kept = (\n"
        "        x[topk_ids.flatten().argsort(stable=True) // topk_ids.shape[1]][: len(x)], topk_ids.clone(),",
        ("test_ancestor.py::test_x_kept_in_expert_order_and_read_in_token_order",),
        "x is saved in the order of the experts and read in that of the tokens.",
    ),
    Mutant(
        "one_place_for_gate_and_up",
        "jitmoe/experts/passes.py",
        "saved = [empty(s.shape, getattr(torch, s.dtype)) for s in wanted]",
        'kept = vars(saved_of).setdefault("kept", {})\n'
        "        saved = [kept.setdefault(s, empty(s.shape, getattr(torch, s.dtype))).detach() for s in wanted]",
        ("test_ancestor.py::test_a_second_forward_overwrites_what_the_first_one_saved",),
        "Gate and up are saved once a layer instead of once a call.",
    ),
    Mutant(
        "stale_lora_b",
        "jitmoe/experts/functional.py",
        "    return lora\n\n\n@lru_cache(maxsize=256)\ndef _shapes",
        "    return [\n"
        '        config.__dict__.setdefault(name, tensor.clone()) if name.endswith("_b") else tensor\n'
        "        for name, tensor in zip(names_of(lora), lora, strict=True)\n"
        "    ]\n\n\n@lru_cache(maxsize=256)\ndef _shapes",
        ("test_ancestor.py::test_an_update_of_lora_seen_by_a_but_not_by_b",),
        "B is copied in the first call, and an optimizer's step is not seen.",
    ),
    Mutant(
        "strides_ignored",
        "jitmoe/experts/passes.py",
        "return tensor.to(torch.bfloat16).contiguous()",
        "return tensor.to(torch.bfloat16)",
        ("test_faults_inputs.py::test_odd_strides_are_right",),
        "A transposed x is read as if its rows were contiguous.",
    ),
    Mutant(
        "gate_and_up_swapped_in_the_fused_weight",
        "jitmoe/hf/layout.py",
        "return list(rows.chunk(len(parts), dim=-2))",
        "return list(rows.chunk(len(parts), dim=-2))[::-1]",
        ("test_hf_models.py::test_the_experts_alone_are_more_right_than_eager",),
        "Rows of gate are taken for those of up.",
    ),
    Mutant(
        "b_of_gate_and_up_never_takes_turns",
        "jitmoe/hf/layout.py",
        "        if self.interleaved:\n            return b.view",
        "        if self.interleaved and self.hidden < 0:\n            return b.view",
        ("test_hf_peft.py::test_a_step_with_lora_is_as_right_as_stock_peft",),
        "LoRA of gpt-oss is read as if all of gate came before all of up.",
    ),
    Mutant(
        "scale_of_a_second_adapter_lost",
        "jitmoe/hf/peft_lora.py",
        "b = [b.to(dtype) * scale for",
        "b = [b.to(dtype) for",
        ("test_hf_peft.py::test_several_adapters_add_up",),
        "Several adapters are concatenated without their scales.",
    ),
    Mutant(
        "adapter_not_handed_over",
        "jitmoe/hf/peft_lora.py",
        "    if not wrappers:\n        return None",
        "    if True:\n        return None",
        ("test_hf_peft.py::test_a_step_with_lora_is_as_right_as_stock_peft",),
        "The experts run without LoRA, and nobody says so.",
    ),
    Mutant(
        "merged_weights_not_seen",
        "jitmoe/hf/packed.py",
        "        self.writes += 1",
        "        self.writes += 0",
        ("test_hf_weight.py::test_the_next_call_sees_what_was_written",),
        "A module does not notice that its packed weights were written.",
    ),
    Mutant(
        "assigned_data_lost",
        "jitmoe/hf/weight.py",
        "        with torch.no_grad():\n            self.copy_(value)",
        "        with torch.no_grad():\n            self.copy_(self.detach())",
        ("test_hf_peft.py::test_merging_gives_the_weights_of_stock_peft",),
        "A safe merge, which assigns .data, leaves the weights as they were.",
    ),
    Mutant(
        "frozen_base_in_silence",
        "jitmoe/hf/experts.py",
        "        if any(ctx.needs_input_grad[2:]):",
        "        if not ctx.needs_input_grad:",
        ("test_hf_models.py::test_base_weights_that_want_a_gradient_are_an_error_in_backward",),
        "Base weights with requires_grad=True get no gradient, without a word.",
    ),
    Mutant(
        "gptq_scales_not_transposed",
        "jitmoe/hf/shipped/gptq.py",
        "scales.mT.contiguous()",
        "scales.reshape(scales.mT.shape)",
        ("test_hf_quantized.py::test_it_computes_what_the_bfloat16_model_does",),
        "Scales of GPTQ have the right shape and belong to other weights.",
    ),
    Mutant(
        "versions_of_gptq_swapped",
        "jitmoe/quantization_config.py",
        "stored_zero=7 if first_version else 8",
        "stored_zero=8 if first_version else 7",
        ("test_hf_quantized.py::test_it_computes_what_the_bfloat16_model_does",),
        "The two versions of GPTQ's files are taken for each other.",
    ),
    Mutant(
        "blocks_of_gate_and_up_never_take_turns",
        "jitmoe/hf/layout.py",
        "return [tensor[start::parts] for start in range(parts)]",
        "return tensor.chunk(parts)",
        ("test_hf_quantized.py::test_it_computes_what_the_bfloat16_model_does",),
        "Codes of gpt-oss are split as if all of gate came before all of up.",
    ),
    Mutant(
        "merge_judged_by_a_rounded_target",
        "jitmoe/hf/rewrite.py",
        "new = new_of(expert, packed.read([expert], packed.parts)[0].float())",
        "new = new_of(expert, packed.read([expert], packed.parts)[0]).float()",
        ("test_hf_quantized.py::test_a_merge_says_what_it_loses",),
        "What a merge loses by the rounding to bfloat16 before the codes is not in its figures.",
    ),
    Mutant(
        "one_a_gradient_of_two",
        "jitmoe/experts/lora.py",
        "        first.add_(summand)",
        "        first.add_(summand, alpha=0)",
        ("test_functional.py::test_fused_adapters_are_two_that_share_an_a",),
        "The gradient of an A that gate and up share is that of gate alone.",
    ),
    Mutant(
        "bias_of_down_added_by_every_part",
        "jitmoe/experts/slices.py",
        "down if part.index == 0 else supplies().zeros(down.shape, down.dtype)",
        "down",
        ("test_tensor_parallel.py::test_every_shape_in_parts",),
        "With tensor parallelism each part adds the bias of down.",
    ),
    Mutant(
        "one_memory_for_the_gradients_of_all_parts",
        "jitmoe/experts/lora.py",
        "tensors[part.index % len(tensors)]",
        "tensors[0]",
        ("test_tensor_parallel.py::test_every_shape_in_parts",),
        "Parts overwrite each other's gradients of what has no axis I.",
    ),
    Mutant(
        "threads_of_nodes_run_anywhere",
        "jitmoe/experts/teams.py",
        "os.sched_setaffinity(0, node.cpus)",
        "os.sched_getaffinity(0)",
        ("test_tensor_parallel.py::TestNodes::test_each_node_computes_its_parts_at_home",),
        "The threads that compute a part are not bound to its NUMA node.",
    ),
    Mutant(
        "broken_seal",
        "jitmoe/experts/functional.py",
        "self.seal.check(name, tensor)",
        "self.seal.close(name, tensor)",
        ("test_pack.py::TestSeal",),
        "A write to the packed weights is taken for right.",
    ),
    Mutant(
        "writes_not_counted",
        "jitmoe/experts/pack.py",
        "            increment_version(tensor)  #",
        "            pass  #",
        ("test_layer.py::TestState::test_a_base_loaded_between_forward_and_backward_is_an_error",),
        "Packing does not tell torch that it writes, so backward multiplies with weights that forward did not have.",
    ),
    Mutant(
        "misspelt_field",
        "jitmoe/experts/passes.py",
        'for field in ("weights", "bias")',
        'for field in ("weight", "bias")',
        ("test_ancestor.py::test_silu_evaluated_wrongly",),
        "A field is misspelt: the record refuses it instead of handing over null.",
    ),
    Mutant(
        "skipped_slots_computed",
        "jitmoe/host/route.py",
        "ids = np.ascontiguousarray(topk_ids)",
        "ids = np.clip(topk_ids, 0, num_experts - 1) if allow_skip else np.ascontiguousarray(topk_ids)",
        ("test_ancestor.py::test_a_slice_of_the_config_keeps_lora",),
        "Slots of experts held elsewhere are computed by the nearest one here.",
    ),
    Mutant(
        "rows_of_distinct_tokens",
        "jitmoe/plan/groups.py",
        "self.segment_rows, rank, threads)",
        "min(self.segment_rows, tokens), rank, threads)",
        ("test_ancestor.py::test_scratch_too_small_where_an_expert_repeats_within_a_token",),
        "Scratch has no room for an expert that a token chose twice.",
    ),
    Mutant(
        "extents_without_the_last_block",
        "jitmoe/plan/groups.py",
        "max(most_blocks, blocks)",
        "max(most_blocks, blocks - 1)",
        ("test_plan.py::test_groups",),
        "The last row block of a group is not counted.",
    ),
    Mutant(
        "in_and_out_of_down_swapped",
        "jitmoe/plan/projections.py",
        'Projection("down", hidden, intermediate)',
        'Projection("down", intermediate, hidden)',
        ("test_ancestor.py::test_silu_evaluated_wrongly",),
        "Down has the extents of gate.",
    ),
    Mutant(
        "variant_of_the_observer_ignored",
        "jitmoe/experts/call.py",
        "        shape = replace(shape, watch=watcher.watch)\n",
        "",
        ("test_checked.py::test_the_setting",),
        "A checked call runs on kernels that check nothing.",
    ),
    Mutant(
        "forked_child_waits",
        "jitmoe/process.py",
        "return 1 if _Fork.happened else threads",
        "return threads",
        ("test_threads.py::TestFork::test_even_where_the_child_asks_for_threads",),
        "A forked child waits for OpenMP threads that only its parent has.",
    ),
    Mutant(
        "short_life",
        "jitmoe/plan/scratch.py",
        '_panel("act_panel", shape, size, shape.intermediate, gate_up, down),',
        '_panel("act_panel", shape, size, shape.intermediate, gate_up, down_low),',
        ("test_checked.py::TestNothingElseChanges::test_same_bits",),
        "The activation's panel is given away a step before it is last read, though nothing wants its place yet.",
    ),
    Mutant(
        "short_life_of_what_is_overwritten",
        "jitmoe/plan/scratch.py",
        '"float32", act_grad, low_grads),',
        '"float32", act_grad, act_grad),',
        ("test_memory.py::test_buffers_that_may_share_can_share",),
        "The parts of the routing weights' gradient are given away before they are added up.",
    ),
    Mutant(
        "lives_half_open",
        "jitmoe/plan/placement.py",
        "return self.first <= other.last and other.first <= self.last",
        "return self.first < other.last and other.first < self.last",
        ("test_memory.py::test_placed_buffers_never_share_while_alive",),
        "Placement and proof both forget the last step of a life.",
    ),
    Mutant(
        "half_a_proof",
        "jitmoe/plan/placement.py",
        "overlap and one.buffer.meets(other.buffer) and",
        "overlap and one.buffer.first == other.buffer.first and",
        ("test_memory.py::test_a_shortened_lifetime_is_really_lost_in_this_example",),
        "The proof compares only buffers that are born together.",
    ),
    Mutant(
        "arena_lent_twice",
        "jitmoe/experts/workspace.py",
        "free.pop() if free else None",
        "free[-1] if free else None",
        ("test_memory.py::TestArenas::test_two_at_once_get_two",),
        "Two calls at once compute in one arena.",
    ),
    Mutant(
        "block_lent_twice",
        "jitmoe/experts/workspace.py",
        "            self._free = [block for block in self._free if block is not best]\n",
        "",
        ("test_memory.py::TestBlocks",),
        "A block that a tensor took stays among the free ones.",
    ),
    Mutant(
        "view_of_a_view_not_held",
        "jitmoe/experts/workspace.py",
        "np.frombuffer(block.data, np.uint8, nbytes)",
        "block[:nbytes]",
        ("test_memory.py::TestBlocks::test_a_block_is_taken_until_its_last_view_is_gone",),
        "A block is free again while NumPy has views of it.",
    ),
    Mutant(
        "result_is_a_view",
        "jitmoe/experts/supplies.py",
        "return memory.view(dtype).view(*shape).detach()",
        "return memory.view(dtype).view(*shape)",
        ("test_autograd.py::TestReusedMemory::test_results_can_be_written_in_place",),
        "A large result is a view of its block, and torch refuses `y += shared`.",
    ),
    Mutant(
        "gradients_of_absent_experts_left",
        "jitmoe/experts/lora.py",
        "grad[begin:end].zero_()",
        "grad[begin + 1 : end].zero_()",
        ("test_autograd.py::TestReusedMemory::test_gradients_of_experts_without_rows_are_zero",),
        "The first of some experts without rows in a row has what lay in the memory for a gradient.",
    ),
    Mutant(
        "digest_not_compared",
        "jitmoe/jit/cache.py",
        'entry.intact and entry.meta.get("key") == key',
        'entry.meta.get("key") == key',
        ("test_build.py::TestDamage::test_a_damaged_entry_is_set_aside_and_built_again",),
        "A damaged library is loaded.",
    ),
    Mutant(
        "templates_not_in_the_key",
        "jitmoe/jit/build.py",
        "for header in headers for part in header)",
        "for header in headers for part in header[:1])",
        ("test_build.py::TestKey",),
        "An edited template runs as it was compiled before.",
    ),
    Mutant(
        "sums_rounded_on_the_way",
        "jitmoe/distributed/exchange.py",
        "[as_bytes(theirs, 4 * hidden)]",
        "[as_bytes(theirs.bfloat16().float(), 4 * hidden)]",
        ("test_distributed_experts.py::test_sums_cross_the_network_in_float32",),
        "Partial sums are rounded to bfloat16 before they are sent back.",
    ),
    Mutant(
        "gradients_of_own_rows_alone",
        "jitmoe/distributed/exchange.py",
        "total = [one.add_(more) for one, more in zip(total, part, strict=True)]",
        "assert part",
        ("test_distributed_experts.py::test_results_and_gradients_are_those_of_one_process",),
        "Experts learn from the tokens of their own rank only.",
    ),
    Mutant(
        "adapter_of_one_rank",
        "jitmoe/distributed/state.py",
        "whole = parameter.detach() if parallel is None else _gathered(key, parameter, parallel)",
        "whole = parameter.detach()",
        ("test_distributed_experts.py::test_one_file_holds_the_adapters_of_all_ranks",),
        "Each rank saves its own experts as if they were all.",
    ),
    Mutant(
        "base_is_broadcast",
        "jitmoe/hf/models.py",
        "        hide_packed(model)\n",
        "        pass\n",
        ("test_distributed_data.py::test_a_peft_model_whose_experts_are_packed",),
        "DistributedDataParallel sends the whole packed base over the network.",
    ),
    Mutant(
        "mapped_pages_written",
        "jitmoe/hf/rewrite.py",
        "if not torch.equal(old.view(torch.int16), new.view(torch.int16)):",
        "if True:",
        ("test_distributed_data.py::test_a_peft_model_whose_experts_are_packed",),
        "What is copied onto itself takes a mapped file's pages out of sharing.",
    ),
)


def main(arguments: list[str]) -> int:
    """Judge the mutants named in ``arguments``, or all; 0 if every one that can run here was killed."""
    parser = argparse.ArgumentParser(description="Put seeded bugs into copies of the tree; the tests must catch each.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a mutant; all of them where none is named")
    parser.add_argument("--list", action="store_true", help="print what they are, and run none")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="how many at a time (%(default)s)"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - {mutant.name for mutant in MUTANTS}:
        parser.error(f"no mutant is called {', '.join(sorted(unknown))}; see --list")
    chosen = [mutant for mutant in MUTANTS if not options.names or mutant.name in options.names]
    if options.list:
        print("\n".join(f"{mutant.name:{WIDTH}}{mutant.file:{WIDTH}}{mutant.bug}" for mutant in chosen))
        return 0
    start = time.monotonic()
    try:
        outcomes = run_mutants(chosen, ROOT, options.jobs, LIMIT)
    except MutationError as error:
        print(error, file=sys.stderr)
        return 1
    print(table(outcomes))
    killed = sum(outcome.status == "killed" for outcome in outcomes)
    print(f"{killed} of {len(outcomes)} killed in {time.monotonic() - start:.0f} s")
    return 0 if all(outcome.good for outcome in outcomes) else 1


WIDTH = 2 + max(len(mutant.name) for mutant in MUTANTS)


def table(outcomes: list[Outcome]) -> str:
    """A line for each: name, seconds, and the test that caught it or what happened instead."""
    lines = [f"{'mutant':{WIDTH}}seconds  caught by"]
    for outcome in outcomes:
        caught = (
            outcome.detail if outcome.status == "killed" else f"{outcome.status.upper()}: {outcome.detail.lstrip()}"
        )
        lines.append(f"{outcome.mutant.name:{WIDTH}}{outcome.seconds:7.0f}  {caught}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
