/* Runs FEX's assembly tests, all of a file, each in a process of its own: natively, or as init's child in a guest.
 *
 * A test is flat code that is loaded at 0x10000 and ends with HLT, which user mode cannot execute; then some registers
 * must hold what its configuration says. The process maps what the test wants and is then driven by ptrace: registers
 * are set and read from outside, so that nothing of this program is needed in the test's address space, and neither
 * its stack pointer nor its segments have to be good for anything.
 *
 * Usage: fex_runner FILE. The file is a sequence of: three 32-bit lengths, the test's name, its code, its configuration
 * as FEX's build makes it (Scripts/json_config_parse.py of FEX). Prints a line a test: "@@ NAME pass",
 * "@@ NAME skip FEATURE" or "@@ NAME fail HOW".
 */
#define _GNU_SOURCE
#include <asm/ldt.h>
#include <cpuid.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

enum { CODE = 0x10000, PAGE = 4096, SECONDS = 120 };
#define SCRATCH 0xe0000000u /* FEX's HarnessCodeLoader::MapMemory: ten pages, */
#define MIDDLE 0xe8000000u  /* a page on either side, */
#define STACK 0xc0000000u   /* and a page for the stack of 32-bit code */

struct config {
	uint64_t match, ignore, stack_size, entry_point;
	uint32_t abi, mode, features;
	uint32_t regions, region_count, registers, register_count, memory, memory_count, environment, environment_count;
} __attribute__((packed));
struct region {
	uint64_t address, size;
} __attribute__((packed));
struct expected {
	uint32_t count;
	uint64_t key, values[];
} __attribute__((packed));
struct memory {
	uint64_t address;
	uint32_t length;
	uint8_t bytes[];
} __attribute__((packed));

struct test {
	const char *name;
	uint32_t name_length, code_length;
	const uint8_t *code;
	const struct config *config;
};

/* What PTRACE_GETREGSET gives for NT_X86_XSTATE: an XSAVE area in the standard format. */
static union {
	uint8_t bytes[16384];
	struct user_fpregs_struct legacy;
} xstate __attribute__((aligned(64)));

static uint32_t leaf(uint32_t number, int which)
{
	uint32_t r[4] = {0};
	__get_cpuid_count(number, 0, &r[0], &r[1], &r[2], &r[3]);
	return r[which];
}

/* The first feature of `wanted` (bits as in FEX's HostFeatures) that this processor lacks. */
static const char *missing(uint32_t wanted)
{
	enum { EAX, EBX, ECX, EDX };
	static const struct {
		const char *name;
		uint32_t leaf;
		int where, bit;
	} features[] = {
		{"3DNow!", 0x80000001, EDX, 31}, {"SSE4a", 0x80000001, ECX, 6}, {"AVX2", 7, EBX, 5}, {"RDRAND", 1, ECX, 30},
		{"SHA", 7, EBX, 29}, {"CLZERO", 0x80000008, EBX, 0}, {"BMI1", 7, EBX, 3}, {"BMI2", 7, EBX, 8}, {"CLWB", 7, EBX, 24},
		{"Linux", 1, EDX, 0}, {"VAES", 7, ECX, 9}, {"Arm's AFP", 0, -1, 0}, {"SSSE3", 1, ECX, 9}, {"SSE4.1", 1, ECX, 19},
		{"SSE4.2", 1, ECX, 20}, {"AES", 1, ECX, 25}, {"PCLMULQDQ", 1, ECX, 1}, {"MOVBE", 1, ECX, 22}, {"ADX", 7, EBX, 19},
		{"XSAVE", 1, ECX, 26}, {"RDPID", 7, ECX, 22}, {"CLFLUSHOPT", 7, EBX, 23}, {"FSGSBASE", 7, EBX, 0},
		{"extended MMX", 0x80000001, EDX, 22},
	};
	for (unsigned i = 0; i < sizeof features / sizeof *features; i++)
		if (wanted >> i & 1 && (features[i].where < 0 || !(leaf(features[i].leaf, features[i].where) >> features[i].bit & 1)))
			return features[i].name;
	return NULL;
}

/* In the child: memory as FEX's HarnessCodeLoader lays it out. */
static void map(uint64_t address, uint64_t size)
{
	void *at = (void *)address;
	if (mmap(at, size, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) != at)
		_exit(100);
}

/* In the child: 0xf is flat 32-bit code and 0x17 flat data, which the 32-bit tests load themselves. */
static void describe_segments(void)
{
	for (int entry = 1; entry <= 2; entry++) {
		struct user_desc descriptor = {.entry_number = entry, .limit = ~0u, .seg_32bit = 1, .limit_in_pages = 1, .useable = 1};
		descriptor.contents = entry == 1 ? MODIFY_LDT_CONTENTS_CODE : MODIFY_LDT_CONTENTS_DATA;
		if (syscall(SYS_modify_ldt, 0x11, &descriptor, sizeof descriptor) != 0)
			_exit(101);
	}
}

static void prepare(const struct test *test)
{
	const struct config *config = test->config;
	const uint8_t *base = (const uint8_t *)config;
	map(SCRATCH, 10 * PAGE);
	map(MIDDLE - PAGE, 2 * PAGE);
	map(CODE, test->code_length);
	memcpy((void *)CODE, test->code, test->code_length);
	const struct region *region = (const void *)(base + config->regions);
	for (uint32_t i = 0; i < config->region_count; i++)
		map(region[i].address, region[i].size);
	if (config->mode == 0) {
		map(STACK, PAGE);
		describe_segments();
	}
	const uint8_t *at = base + config->memory;
	for (uint32_t i = 0; i < config->memory_count; i++) {
		const struct memory *memory = (const void *)at;
		memcpy((void *)memory->address, memory->bytes, memory->length);
		at += sizeof *memory + memory->length;
	}
}

static int set_registers(pid_t child, const struct config *config)
{
	struct user_regs_struct registers;
	if (ptrace(PTRACE_GETREGS, child, 0, &registers) != 0)
		return -1;
	struct user_regs_struct fresh = {.rip = CODE, .cs = config->mode == 0 ? 0xf : registers.cs, .ss = registers.ss, .eflags = 0x202};
	fresh.orig_rax = -1; /* no system call to go on with */
	if (ptrace(PTRACE_SETREGS, child, 0, &fresh) != 0)
		return -1;
	struct iovec area = {xstate.bytes, sizeof xstate.bytes};
	if (ptrace(PTRACE_GETREGSET, child, NT_X86_XSTATE, &area) != 0)
		return -1;
	/* XSTATE_BV without a bit: everything as after reset. */
	memset(xstate.bytes + 512, 0, 8);
	xstate.legacy.mxcsr = 0x1f80;
	return ptrace(PTRACE_SETREGSET, child, NT_X86_XSTATE, &area);
}

/* Word `word` of the register that bit `index` of FEX's `Regs` stands for. */
static int value_of(unsigned index, uint32_t word, const struct user_regs_struct *r, uint64_t *value)
{
	const unsigned long long general[] = {r->rip, r->rax, r->rbx, r->rcx, r->rdx, r->rsi, r->rdi, r->rbp, r->rsp,
					      r->r8,  r->r9,  r->r10, r->r11, r->r12, r->r13, r->r14, r->r15};
	const uint64_t present = *(uint64_t *)(xstate.bytes + 512);
	if (index < 17 && word == 0) {
		*value = general[index];
		return 0;
	}
	if (index >= 17 && index < 33 && word < 4) {
		const uint64_t component = word < 2 ? 1 : 2;
		const uint8_t *at = word < 2 ? xstate.bytes + 160 + (index - 17) * 16 + word * 8
					     : xstate.bytes + 576 + (index - 17) * 16 + (word - 2) * 8;
		/* A component in its initial state may hold anything (SDM vol. 1, 13.7). */
		memcpy(value, at, 8);
		if (!(present >> component & 1))
			*value = 0;
		return 0;
	}
	if (index >= 35 && index < 43 && word < 2) {
		/* FEX counts registers of the stack from its bottom, XSAVE from its top. */
		const unsigned top = xstate.legacy.swd >> 11 & 7;
		memcpy(value, xstate.bytes + 32 + (index - 35 + 8 - top) % 8 * 16 + word * 8, 8);
		if (word == 1)
			*value &= 0xffff;
		if (!(present & 1))
			*value = 0;
		return 0;
	}
	return -1;
}

static void compare(pid_t child, const struct user_regs_struct *registers, const struct config *config)
{
	struct iovec area = {xstate.bytes, sizeof xstate.bytes};
	if (ptrace(PTRACE_GETREGSET, child, NT_X86_XSTATE, &area) != 0) {
		printf("fail: its vector registers cannot be read\n");
		return;
	}
	const uint8_t *at = (const uint8_t *)config + config->registers;
	for (uint32_t i = 0; i < config->register_count; i++) {
		const struct expected *expected = (const void *)at;
		const unsigned index = __builtin_ctzll(expected->key);
		for (uint32_t word = 0; word < expected->count; word++) {
			uint64_t value;
			if (value_of(index, word, registers, &value) != 0) {
				printf("fail: register %u[%u] is not known\n", index, word);
				return;
			}
			if (value != expected->values[word]) {
				static const char names[][4] = {"RIP", "RAX", "RBX", "RCX", "RDX", "RSI", "RDI", "RBP", "RSP",
								"R8",  "R9",  "R10", "R11", "R12", "R13", "R14", "R15"};
				if (index < 17)
					printf("fail: %s", names[index]);
				else
					printf("fail: %s%u[%u]", index < 33 ? "XMM" : "MM", index - (index < 33 ? 17 : 35), word);
				printf(" is %#lx, not %#lx\n", value, expected->values[word]);
				return;
			}
		}
		at += sizeof *expected + expected->count * 8;
	}
	printf("pass\n");
}

/* Follows the child to its HLT or to its end. */
static void follow(pid_t child, const struct config *config)
{
	int status, signal = 0;
	struct user_regs_struct registers = {0};
	for (;;) {
		if (ptrace(PTRACE_CONT, child, 0, signal) != 0 || waitpid(child, &status, 0) != child) {
			printf("fail: %s\n", strerror(errno));
			return;
		}
		if (WIFEXITED(status)) {
			printf("fail: exits with %d\n", WEXITSTATUS(status));
			return;
		}
		if (WIFSIGNALED(status)) {
			printf("fail: signal %d at %#llx\n", WTERMSIG(status), registers.rip);
			return;
		}
		signal = WSTOPSIG(status);
		if (ptrace(PTRACE_GETREGS, child, 0, &registers) != 0) {
			printf("fail: its registers cannot be read\n");
			return;
		}
		errno = 0;
		const long code = ptrace(PTRACE_PEEKTEXT, child, (void *)registers.rip, 0);
		if (signal == SIGSEGV && errno == 0 && (code & 0xff) == 0xf4) {
			compare(child, &registers, config);
			return;
		}
		/* Any other signal is the test's own to handle, or its end. */
	}
}

static void run(const struct test *test)
{
	const char *lacking = missing(test->config->features);
	printf("@@ %.*s ", (int)test->name_length, test->name);
	if (lacking) {
		printf("skip: no %s\n", lacking);
		return;
	}
	fflush(stdout);
	const pid_t child = fork();
	if (child == 0) {
		prepare(test);
		alarm(SECONDS);
		ptrace(PTRACE_TRACEME, 0, 0, 0);
		raise(SIGSTOP);
		_exit(102);
	}
	int status;
	if (child < 0 || waitpid(child, &status, 0) != child)
		printf("fail: %s\n", strerror(errno));
	else if (WIFEXITED(status))
		printf("fail: its memory cannot be prepared (%d)\n", WEXITSTATUS(status));
	else if (!WIFSTOPPED(status) || ptrace(PTRACE_SETOPTIONS, child, 0, PTRACE_O_EXITKILL) != 0 || set_registers(child, test->config))
		printf("fail: its registers cannot be set: %s\n", strerror(errno));
	else
		follow(child, test->config);
	fflush(stdout);
	if (child > 0) {
		kill(child, SIGKILL);
		waitpid(child, &status, 0);
	}
}

int main(int count, char **arguments)
{
	struct stat about;
	const int file = count == 2 ? open(arguments[1], O_RDONLY) : -1;
	if (file < 0 || fstat(file, &about) != 0) {
		fprintf(stderr, "fex_runner: cannot read the file of tests\n");
		return 2;
	}
	const uint8_t *at = mmap(NULL, about.st_size, PROT_READ, MAP_PRIVATE, file, 0);
	if (at == MAP_FAILED) {
		perror("fex_runner: mapping the file of tests");
		return 2;
	}
	for (const uint8_t *end = at + about.st_size; at < end;) {
		uint32_t lengths[3];
		memcpy(lengths, at, sizeof lengths);
		at += sizeof lengths;
		const struct test test = {
			.name = (const char *)at,
			.name_length = lengths[0],
			.code = at + lengths[0],
			.code_length = lengths[1],
			.config = (const void *)(at + lengths[0] + lengths[1]),
		};
		run(&test);
		at += lengths[0] + lengths[1] + lengths[2];
	}
	return 0;
}
