// Runs single instructions for test_emulator.py with all registers given and all registers taken back.
// The instructions are the assembler's: the test writes them into emulator_stubs.inc as
//   stub_<n>:      <instruction> ; ret
//   trapped_<n>:   ud2 ; <instruction> ; ret
// The second form is emulated even where the CPU knows the instruction: see handle_ud2.
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

struct Registers {
  uint8_t zmm[32][64];
  uint64_t k[8];
  uint64_t general[16];  // in the order of their numbers; rsp is not touched
  uint64_t mxcsr;
};

// clang-format off
asm(R"(
  .altmacro
  .macro each_zmm operation:vararg
    .set i, 0
    .rept 32
      \operation %i
      .set i, i + 1
    .endr
  .endm
  .macro load_zmm number
    vmovdqu64 64*\number(%rsi), %zmm\number
  .endm
  .macro store_zmm number
    vmovdqu64 %zmm\number, 64*\number(%rsi)
  .endm
  .macro each_k operation
    .set i, 0
    .rept 8
      \operation %i
      .set i, i + 1
    .endr
  .endm
  .macro load_k number
    kmovq 2048+8*\number(%rsi), %k\number
  .endm
  .macro store_k number
    kmovq %k\number, 2048+8*\number(%rsi)
  .endm

  .text
  .globl driver_run_general
load_vectors:
  each_zmm load_zmm
  each_k load_k
  ret
store_vectors:
  each_zmm store_zmm
  each_k store_k
  ret

# (code, registers, with vectors)
driver_run_general:
  push %rbx
  push %rbp
  push %r12
  push %r13
  push %r14
  push %r15
  sub $40, %rsp
  mov %rdi, 0(%rsp)
  mov %rsi, 8(%rsp)
  mov %rdx, 16(%rsp)
  stmxcsr 24(%rsp)
  test %rdx, %rdx
  jz 1f
  call load_vectors
1:
  ldmxcsr 2240(%rsi)
  mov 2112+8*0(%rsi), %rax
  mov 2112+8*1(%rsi), %rcx
  mov 2112+8*2(%rsi), %rdx
  mov 2112+8*3(%rsi), %rbx
  mov 2112+8*5(%rsi), %rbp
  mov 2112+8*7(%rsi), %rdi
  mov 2112+8*8(%rsi), %r8
  mov 2112+8*9(%rsi), %r9
  mov 2112+8*10(%rsi), %r10
  mov 2112+8*11(%rsi), %r11
  mov 2112+8*12(%rsi), %r12
  mov 2112+8*13(%rsi), %r13
  mov 2112+8*14(%rsi), %r14
  mov 2112+8*15(%rsi), %r15
  mov 2112+8*6(%rsi), %rsi
  call *0(%rsp)
  mov %rsi, 32(%rsp)
  mov 8(%rsp), %rsi
  mov %rax, 2112+8*0(%rsi)
  mov %rcx, 2112+8*1(%rsi)
  mov %rdx, 2112+8*2(%rsi)
  mov %rbx, 2112+8*3(%rsi)
  mov %rbp, 2112+8*5(%rsi)
  mov %rdi, 2112+8*7(%rsi)
  mov %r8, 2112+8*8(%rsi)
  mov %r9, 2112+8*9(%rsi)
  mov %r10, 2112+8*10(%rsi)
  mov %r11, 2112+8*11(%rsi)
  mov %r12, 2112+8*12(%rsi)
  mov %r13, 2112+8*13(%rsi)
  mov %r14, 2112+8*14(%rsi)
  mov %r15, 2112+8*15(%rsi)
  mov 32(%rsp), %rax
  mov %rax, 2112+8*6(%rsi)
  stmxcsr 2240(%rsi)
  ldmxcsr 24(%rsp)
  cmpq $0, 16(%rsp)
  je 2f
  call store_vectors
  vzeroupper
2:
  add $40, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbp
  pop %rbx
  ret

# (image, registers): every component that vectors use, from and to an XSAVE image
  .macro with_image name, before, instruction, after
  .globl \name
\name:
  \before
  mov $0xe6, %eax
  xor %edx, %edx
  \instruction (%rdi)
  \after
  vzeroupper
  ret
  .endm
  with_image driver_xsave, <call load_vectors>, xsave, nop
  with_image driver_xsavec, <call load_vectors>, xsavec, nop
  with_image driver_xrstor, nop, xrstor, <call store_vectors>
)");
// clang-format on

#include "emulator_stubs.inc"

extern "C" {

// Operand of the instructions that address relative to rip.
[[gnu::visibility("hidden")]] alignas(64) uint8_t driver_operand[64];
void* driver_operand_address() { return driver_operand; }

void driver_run_general(const void* code, Registers* registers, int64_t with_vectors);

namespace {

int (*emulator_step)(void*);
struct sigaction previous;
int sent_signals = 0;
thread_local char last_error[512];

// Behind ud2 stands an instruction for the emulator alone. The emulator passes ud2 itself on to this
// handler, the one that was there before. If it was installed first, it is the other way round.
void handle_ud2(int signal, siginfo_t* info, void* context) {
  auto& rip = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP];
  if (info->si_code <= 0) {
    ++sent_signals;
  } else if (!memcmp(reinterpret_cast<void*>(rip), "\x0f\x0b", 2)) {
    rip += 2;
    if (!emulator_step(context)) abort();
  } else if (previous.sa_handler == SIG_DFL) {
    sigaction(signal, &previous, nullptr);
  } else {
    previous.sa_sigaction(signal, info, context);
  }
}

void keep_error(const char* message) { strncpy(last_error, message, sizeof last_error - 1); }

}  // namespace

int driver_install(int (*step)(void*)) {
  emulator_step = step;
  struct sigaction action = {};
  action.sa_sigaction = handle_ud2;
  action.sa_flags = SA_SIGINFO;
  return sigaction(SIGILL, &action, &previous);
}

int driver_sent_signals() { return sent_signals; }

using ErrorHook = void (*)(const char*);
ErrorHook driver_error_hook() { return keep_error; }

// Runs one stub. Returns the message of the instruction if it was refused, else an empty one.
const char* driver_run(const void* code, Registers* registers, int64_t with_vectors) {
  last_error[0] = 0;
  driver_run_general(code, registers, with_vectors);
  return last_error;
}

// Emulates the instruction at `code` with vector registers in `image`; returns the bytes that RIP moved.
int64_t driver_step(uint8_t* image, const void* code, const Registers* registers) {
  constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  last_error[0] = 0;
  const struct {
    uint32_t magic, size;
    uint64_t features;
  } software = {FP_XSTATE_MAGIC1, 0, 0xe7};
  memcpy(image + 464, &software, sizeof software);
  ucontext_t context = {};
  context.uc_mcontext.fpregs = reinterpret_cast<fpregset_t>(image);
  for (int i = 0; i < 16; ++i) context.uc_mcontext.gregs[kOrder[i]] = registers->general[i];
  const auto start = reinterpret_cast<greg_t>(code);
  context.uc_mcontext.gregs[REG_RIP] = start;
  return emulator_step(&context) ? context.uc_mcontext.gregs[REG_RIP] - start : 0;
}

const char* driver_last_error() { return last_error; }
}
