// Executes the AVX512-BF16 instructions on the vector registers in the signal frame. Belongs to emulator.cpp alone.
#pragma once
#include <immintrin.h>
#include <string.h>

#include <cmath>

#include "bf16.hpp"
#include "tools/emulator_registers.hpp"
#include "tools/emulator_tiles.hpp"

namespace jitmoe::emulator {
namespace {

union Vector {
  alignas(64) uint8_t bytes[64];
  uint16_t half[32];
  uint32_t lane[16];
};

// bfloat16 of a float32: denormals become zero, other values are rounded by to_bf16.
uint16_t convert(uint32_t bits) {
  const bool tiny = (bits & 0x7f800000) == 0;
  return tiny ? bits >> 16 & 0x8000 : to_bf16(std::bit_cast<float>(bits));
}

bool is_nan(uint32_t bits) { return (bits & 0x7fffffff) > 0x7f800000; }

// One lane of VDPBF16PS: two fused multiply-adds, the odd element first. With NaN among the operands the
// first in this order is the result (SDM, table of NaN propagation priorities).
__attribute__((target("avx2,fma"))) uint32_t multiply_pairs(uint32_t sum, uint32_t a, uint32_t b) {
  for (uint32_t operand : {a << 16, b << 16, a & 0xffff0000, b & 0xffff0000, sum})
    if (is_nan(operand)) return operand | 0x00400000;
  const float odd = std::fma(to_float(a >> 16), to_float(b >> 16), std::bit_cast<float>(sum));
  return std::bit_cast<uint32_t>(
      std::fma(to_float(static_cast<bf16>(a)), to_float(static_cast<bf16>(b)), odd));
}

// Loads the lanes of the last operand that `wanted` names; masked-off memory is not touched.
Vector load_operand(const VectorRegisters& registers, const Instruction& instruction, uint32_t wanted) {
  Vector operand = {};
  if (!instruction.memory) {
    registers.read(instruction.rm, operand.bytes);
    return operand;
  }
  for (int i = 0; i < instruction.vector_bytes / 4; ++i)
    if (wanted >> i & 1)
      memcpy(&operand.lane[i], instruction.memory + (instruction.broadcast ? 0 : 4 * i), 4);
  return operand;
}

// Writes `value` where the mask allows, in elements of `size` bytes; the register becomes zero above them.
void write_masked(VectorRegisters& registers, const Instruction& instruction, uint32_t mask, int size,
                  int elements, const Vector& value) {
  Vector old, result = value;
  registers.read(instruction.reg, old.bytes);
  for (int i = 0; i < elements; ++i)
    if (!(mask >> i & 1)) {
      if (instruction.zeroing)
        memset(result.bytes + i * size, 0, size);
      else
        memcpy(result.bytes + i * size, old.bytes + i * size, size);
    }
  memset(result.bytes + elements * size, 0, sizeof result.bytes - elements * size);
  registers.write(instruction.reg, result.bytes);
}

uint32_t write_mask(const VectorRegisters& registers, const Instruction& instruction) {
  return instruction.mask ? static_cast<uint32_t>(registers.mask(instruction.mask)) : ~uint32_t{0};
}

bool vdpbf16ps(VectorRegisters& registers, const Instruction& instruction) {
  const int lanes = instruction.vector_bytes / 4;
  const uint32_t mask = write_mask(registers, instruction);
  const Vector b = load_operand(registers, instruction, mask);
  Vector a, sum;
  registers.read(instruction.vvvv, a.bytes);
  registers.read(instruction.reg, sum.bytes);
  for (int i = 0; i < lanes; ++i) sum.lane[i] = multiply_pairs(sum.lane[i], a.lane[i], b.lane[i]);
  write_masked(registers, instruction, mask, 4, lanes, sum);
  return true;
}

bool vcvtneps2bf16(VectorRegisters& registers, const Instruction& instruction) {
  const int lanes = instruction.vector_bytes / 4;
  const uint32_t mask = write_mask(registers, instruction);
  const Vector source = load_operand(registers, instruction, mask);
  Vector result = {};
  for (int i = 0; i < lanes; ++i) result.half[i] = convert(source.lane[i]);
  write_masked(registers, instruction, mask, 2, lanes, result);
  return true;
}

// The last operand fills the lower half. Its exception class (E4NF) reads all of it, whatever the mask.
bool vcvtne2ps2bf16(VectorRegisters& registers, const Instruction& instruction) {
  const int lanes = instruction.vector_bytes / 4;
  const Vector low = load_operand(registers, instruction, ~uint32_t{0});
  Vector high, result = {};
  registers.read(instruction.vvvv, high.bytes);
  for (int i = 0; i < lanes; ++i) {
    result.half[i] = convert(low.lane[i]);
    result.half[lanes + i] = convert(high.lane[i]);
  }
  write_masked(registers, instruction, write_mask(registers, instruction), 2, 2 * lanes, result);
  return true;
}

template <bool (*Execute)(VectorRegisters&, const Instruction&)>
bool with_vectors(Machine& machine, const Instruction& instruction) {
  VectorRegisters registers(machine.context);
  if (!registers.has_avx512()) return refuse(machine, "the signal frame holds no AVX-512 registers");
  return Execute(registers, instruction);
}

}  // namespace
}  // namespace jitmoe::emulator
