// A 32-bit Linux program that needs no C library: what 32-bit programs ask of the processor, checked one by one.
// Built with gcc -m32 -static -nostdlib; prints "check NAME ok" or "check NAME FAILED", and "checks done".
typedef unsigned int u32;
typedef unsigned long long u64;

static int int80(int n, int a, int b, int c, int d, int e) {
  int r;
  __asm__ volatile("int $0x80" : "=a"(r) : "a"(n), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e) : "memory");
  return r;
}

static int length(const char *s) { int n = 0; while (s[n]) n++; return n; }
static void say(const char *s) { int80(4, 1, (int)s, length(s), 0, 0); }
static void check(const char *name, int good) {
  say("check ");
  say(name);
  say(good ? " ok\n" : " FAILED\n");
}

// The kernel's own entry for system calls, in the vDSO: SYSENTER, SYSCALL or INT 80h, as the CPU has it.
static u32 vsyscall;
static int through_vdso(int n, int a) {
  int r;
  __asm__ volatile("call *%3" : "=a"(r) : "a"(n), "b"(a), "m"(vsyscall) : "ecx", "edx", "memory");
  return r;
}

struct user_desc { u32 entry, base, limit, flags; };
static char storage[64] __attribute__((aligned(16)));

static void thread_storage(void) {
  struct user_desc d = {-1u, (u32)(storage + 32), 0xfffff, 0x51}; // 32-bit, in pages, usable
  int r = int80(243, (int)&d, 0, 0, 0, 0);
  __asm__ volatile("mov %0, %%gs" : : "r"(d.entry << 3 | 3));
  u32 above, below;
  __asm__ volatile("movl $0x1234, %%gs:0; movl $0x5678, %%gs:-8; movl %%gs:0, %0; movl %%gs:-8, %1"
                   : "=r"(above), "=r"(below) : : "memory");
  int seen = *(u32 *)(storage + 32) == 0x1234 && *(u32 *)(storage + 24) == 0x5678;
  check("thread-local storage", r == 0 && above == 0x1234 && below == 0x5678 && seen);
}

// A segment with a base and a limit, in the LDT: used as DS around one read inside and one beyond.
static volatile int faults, last_signal;
static volatile u32 resume_at, fault_address;

static void local_segment(void) {
  struct user_desc d = {1, (u32)storage, 31, 0x41}; // 32-bit, in bytes
  int r = int80(123, 1, (int)&d, sizeof d, 0, 0);
  u32 inside = 0, beyond = 7;
  storage[28] = 99;
  __asm__ volatile("mov %%ds, %%ecx; mov %2, %%ds; movl 28, %0; mov %%ecx, %%ds" : "=&r"(inside) : "m"(r), "r"(0xf) : "ecx");
  faults = 0;
  __asm__ volatile("movl $1f, %1; mov %3, %%fs; movl %%fs:29, %0; 1:" : "+r"(beyond), "=m"(resume_at), "+m"(faults) : "r"(0xf));
  check("a segment with a base", r == 0 && inside == 99);
  check("a segment's limit", faults == 1 && last_signal == 11 && beyond == 7);
  __asm__ volatile("mov %0, %%fs" : : "r"(0));
}

struct sigaction32 { void *handler; u32 flags; void *restorer; u32 mask[2]; };
// Registers in a signal's context (arch/x86/include/uapi/asm/sigcontext.h): EIP is word 14, ECX word 10.
struct ucontext32 { u32 flags, link, stack[3], registers[22]; };

static void handler(int signal, u32 *info, struct ucontext32 *context) {
  faults++;
  last_signal = signal;
  fault_address = info[3];
  // Whatever the handler does to these, the program must not see.
  __asm__ volatile("pcmpeqd %%xmm0, %%xmm0; fninit; fldpi" : : : "xmm0");
  if (resume_at) context->registers[14] = resume_at;
  resume_at = 0;
}
__asm__(".text; restore: movl $173, %eax; int $0x80"); // rt_sigreturn
extern char restore[];

static void signals(void) {
  struct sigaction32 action = {handler, 0x4 | 0x04000000 | 0x40000000, restore, {0, 0}};
  int r = 0;
  int numbers[] = {4, 5, 8, 10, 11};
  for (int i = 0; i < 5; i++) r |= int80(174, numbers[i], (int)&action, 0, 8, 0);
  static u32 before[4] = {1, 2, 3, 4}, after[4];
  double depth = 0;
  faults = 0;
  __asm__ volatile("movdqu %3, %%xmm0; fninit; fld1; fadd %%st(0), %%st(0); movl $1f, %1; movl 0x10, %%eax; 1: movdqu %%xmm0, %2; fstpl %0"
                   : "=m"(depth), "=m"(resume_at), "=m"(after) : "m"(before) : "eax", "xmm0", "memory");
  int kept = depth == 2.0;
  for (int i = 0; i < 4; i++) kept &= after[i] == before[i];
  check("a page fault's signal", r == 0 && faults == 1 && last_signal == 11 && fault_address == 0x10);
  check("SSE and x87 over a signal", kept);
  u32 quotient = 5;
  __asm__ volatile("movl $1f, %1; xorl %%ecx, %%ecx; xorl %%edx, %%edx; divl %%ecx; 1:" : "+a"(quotient), "=m"(resume_at) : : "ecx", "edx", "memory");
  check("a division by zero", faults == 2 && last_signal == 8 && quotient == 5);
  int over;
  __asm__ volatile("movl $1f, %1; movl $0x7fffffff, %0; addl $1, %0; into; 1:" : "=&r"(over), "=m"(resume_at) : : "memory");
  check("INTO", faults == 3 && last_signal == 11);
  int80(37, int80(20, 0, 0, 0, 0, 0), 10, 0, 0, 0);
  check("a signal to oneself", faults == 4 && last_signal == 10);
}

static void only_32_bits(void) {
  u32 a, b, c, sp;
  __asm__ volatile("movb $0x27, %%al; addb $0x35, %%al; daa; movzbl %%al, %0" : "=r"(a) : : "eax");
  __asm__ volatile("movl $0x0007, %%eax; movb $0x09, %%cl; addb %%cl, %%al; aaa; movl %%eax, %0" : "=r"(b) : : "eax", "ecx");
  check("BCD", a == 0x62 && b == 0x106);
  __asm__ volatile("movl %%esp, %2; movl $7, %%eax; movl $9, %%ecx; pushal; xorl %%eax, %%eax; xorl %%ecx, %%ecx; popal;"
                   "movl %%eax, %0; movl %%ecx, %1; subl %%esp, %2" : "=m"(a), "=m"(b), "=m"(sp) : : "eax", "ecx", "edx", "memory");
  check("PUSHA and POPA", a == 7 && b == 9 && sp == 0);
  __asm__ volatile("pushl %%ds; popl %0; pushl %%cs; popl %1; pushfl; popl %2" : "=r"(a), "=r"(b), "=r"(c));
  check("selectors and flags on the stack", (a & 3) == 3 && (b & 3) == 3 && (c & 0x202) == 0x202);
  __asm__ volatile("movl $0x40000000, %%ecx; leal 0x7fffffff(%%ecx,%%ecx,4), %0" : "=r"(a) : : "ecx");
  check("addresses that wrap", a == 0xbfffffffu);
  static const char text[] = "the quick brown fox";
  __asm__ volatile("cld; movl %1, %%edi; movb $'b', %%al; movl $100, %%ecx; repne scasb; movl %%edi, %0" : "=r"(a) : "r"(text) : "eax", "ecx", "edi");
  check("REPNE SCAS", a == (u32)text + 11);
}

static u32 fib(u32 n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }

static void code_that_changes(void) {
  unsigned char *page = (unsigned char *)int80(192, 0, 4096, 7, 0x22, -1); // mmap2: read, write, execute
  int good = 1;
  for (u32 i = 0; i < 200; i++) {
    page[0] = 0xb8; // mov eax, i; ret
    *(u32 *)(page + 1) = i;
    page[5] = 0xc3;
    good &= ((u32(*)(void))page)() == i;
  }
  check("code that changes", good);
}

static void processes(void) {
  int ends[2], status = 0;
  int80(42, (int)ends, 0, 0, 0, 0);
  int child = int80(2, 0, 0, 0, 0, 0);
  if (child == 0) {
    u32 answer = fib(15);
    int80(4, ends[1], (int)&answer, 4, 0, 0);
    int80(1, 7, 0, 0, 0, 0);
  }
  u32 answer = 0;
  int80(3, ends[0], (int)&answer, 4, 0, 0);
  int80(7, child, (int)&status, 0, 0, 0);
  check("fork, pipe and wait", answer == 610 && status == 7 << 8);
}

static void system_calls(void) {
  int same = 1, me = int80(20, 0, 0, 0, 0, 0);
  for (int i = 0; i < 1000; i++) same &= through_vdso(20, 0) == me;
  check("the vDSO's system calls", vsyscall != 0 && same);
}

__attribute__((used)) static void begin(u32 *stack) {
  u32 *at = stack + 1 + stack[0] + 1; // argc, argv and its end
  while (*at++) {} // the environment
  for (; at[0]; at += 2) if (at[0] == 32) vsyscall = at[1]; // AT_SYSINFO
  system_calls();
  thread_storage();
  signals();
  local_segment();
  only_32_bits();
  code_that_changes();
  processes();
  check("recursion", fib(20) == 6765);
  say("checks done\n");
  int80(1, 0, 0, 0, 0, 0);
}
__asm__(".text; .globl _start; _start: xorl %ebp, %ebp; movl %esp, %eax; andl $-16, %esp; subl $12, %esp; pushl %eax; call begin");
