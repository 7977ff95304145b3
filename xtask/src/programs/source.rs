//! A C program of any length, always the same: what gcc compiles in `cargo xtask programs`.
//!
//! Its functions are of eight kinds, with other constants, names and bounds each time: what ordinary C is made of
//! (structures, lists, hash tables, strings, state machines, matrices, recursion, bits). Each calls earlier ones.
//! Arithmetic is unsigned or floating-point, so nothing is undefined; `main` prints a checksum of all of them.

use std::fmt::Write;

const PRELUDE: &str = r#"#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct item {
    uint32_t key, count;
    double weight;
    char name[24];
    struct item *next;
};

struct table {
    struct item *slots[64];
    uint32_t used;
};

enum token { T_END, T_NUMBER, T_NAME, T_OPEN, T_CLOSE, T_OPERATOR };

typedef uint32_t function(uint32_t a, uint32_t b);

static uint32_t mix(uint32_t a, uint32_t b)
{
    a ^= b + 0x9e3779b9u + (a << 6) + (a >> 2);
    return a;
}
"#;

/// A linear congruential generator: quality does not matter, sameness does.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % u64::from(limit)) as u32
    }
}

/// A program of at least `lines` lines, and few more.
pub fn program(lines: usize) -> String {
    let mut text = PRELUDE.to_owned();
    let mut numbers = Numbers(2026);
    let mut count = 0;
    let mut written = text.lines().count();
    while written < lines {
        let piece = function(count, &mut numbers);
        written += piece.lines().count();
        text.push_str(&piece);
        count += 1;
    }
    let mut write = |line: String| writeln!(text, "{line}").expect("writing to a string");
    write("\nstatic function *const functions[] = {".into());
    for n in 0..count {
        write(format!("    f{n},"));
    }
    write("};\n".into());
    write("int main(void)\n{\n    uint32_t sum = 1, n;".into());
    write(format!("    for (n = 0; n < {count}; n++)\n        sum = mix(sum, functions[n](n, sum));"));
    write("    printf(\"%08x\\n\", sum);\n    return 0;\n}".into());
    text
}

/// A function `fN`, after its helpers. `$` and letters in the templates stand for numbers made up for it.
fn function(n: u32, numbers: &mut Numbers) -> String {
    let template = KINDS[numbers.below(KINDS.len() as u32) as usize];
    // A function calls at most one other, and that one a much earlier one: run time stays small.
    let earlier = if n > 8 { format!("f{}(a & 7, b)", n / 2 - numbers.below(n / 4)) } else { "a * 3 + b".into() };
    let mut text = format!("\n{template}").replace("$N", &n.to_string()).replace("$CALL", &earlier);
    for (letter, limit) in [("$A", 13), ("$B", 29), ("$C", 61), ("$D", 251), ("$E", 65521)] {
        // One occurrence at a time: each has a number of its own.
        while text.contains(letter) {
            text = text.replacen(letter, &(numbers.below(limit) + 2).to_string(), 1);
        }
    }
    text
}

const KINDS: [&str; 8] = [
    // A hash table with chains.
    r#"static void insert$N(struct table *table, uint32_t key, double weight)
{
    struct item **slot = &table->slots[(key * $Eu >> 7) % 64];
    while (*slot && (*slot)->key != key)
        slot = &(*slot)->next;
    if (!*slot) {
        struct item *item = calloc(1, sizeof *item);
        if (!item)
            exit(1);
        item->key = key;
        snprintf(item->name, sizeof item->name, "item-%u-%u", key % $Eu, $Du);
        *slot = item;
        table->used++;
    }
    (*slot)->count += $A;
    (*slot)->weight += weight;
}

static uint32_t f$N(uint32_t a, uint32_t b)
{
    struct table table = {{0}, 0};
    uint32_t n, result = $CALL;
    for (n = 0; n < $C; n++)
        insert$N(&table, mix(a, n) % $D, n * 0.$B);
    for (n = 0; n < 64; n++) {
        struct item *item = table.slots[n];
        while (item) {
            struct item *next = item->next;
            result = mix(result, item->count + (uint32_t)item->weight + (uint32_t)strlen(item->name));
            free(item);
            item = next;
        }
    }
    return result + table.used;
}
"#,
    // A reader of expressions: a state machine over characters.
    r#"static enum token next$N(const char **at, uint32_t *value)
{
    const char *p = *at;
    enum token token;
    while (*p == ' ')
        p++;
    switch (*p) {
    case 0:
        token = T_END;
        break;
    case '(':
        token = T_OPEN;
        p++;
        break;
    case ')':
        token = T_CLOSE;
        p++;
        break;
    case '+': case '-': case '*': case '^': case '|':
        token = T_OPERATOR;
        *value = (uint32_t)*p++;
        break;
    case '0': case '1': case '2': case '3': case '4':
    case '5': case '6': case '7': case '8': case '9':
        token = T_NUMBER;
        for (*value = 0; *p >= '0' && *p <= '9'; p++)
            *value = *value * 10 + (uint32_t)(*p - '0');
        break;
    default:
        token = T_NAME;
        *value = (uint32_t)*p++ * $D;
    }
    *at = p;
    return token;
}

static uint32_t f$N(uint32_t a, uint32_t b)
{
    const char *text = "($D+x)*($E - y^$B) | ($C+($A*z))";
    uint32_t value = 0, sum = a, depth = 0;
    char operator = '+';
    enum token token;
    while ((token = next$N(&text, &value)) != T_END) {
        if (token == T_OPERATOR) {
            operator = (char)value;
        } else if (token == T_OPEN) {
            depth++;
            sum += $B;
        } else if (token == T_CLOSE && depth) {
            depth--;
        } else {
            switch (operator) {
            case '+': sum += value; break;
            case '-': sum -= value; break;
            case '*': sum *= value | 1; break;
            case '^': sum ^= value << (depth & 7); break;
            default: sum |= value;
            }
        }
    }
    return mix(sum, $CALL);
}
"#,
    // Matrices of doubles.
    r#"static uint32_t f$N(uint32_t a, uint32_t b)
{
    double left[8][8], right[8][8], product[8][8], trace = 0;
    unsigned i, j, k;
    for (i = 0; i < 8; i++)
        for (j = 0; j < 8; j++) {
            left[i][j] = (double)((a + i * $C + j) % $D) / $B;
            right[i][j] = i == j ? 1.5 : (double)((b + j * $A) % $C) * 0.$D;
        }
    for (i = 0; i < 8; i++)
        for (j = 0; j < 8; j++) {
            double sum = 0;
            for (k = 0; k < 8; k++)
                sum += left[i][k] * right[k][j];
            product[i][j] = sum > $E.0 ? sqrt(sum) : sum;
        }
    for (i = 0; i < 8; i++)
        trace += product[i][i] + product[i][7 - i] * 0.$A;
    if (trace < 0)
        trace = -trace;
    return mix((uint32_t)fmod(trace, 1e6), $CALL);
}
"#,
    // Text that is made, searched and changed.
    r#"static uint32_t f$N(uint32_t a, uint32_t b)
{
    static const char *const words[] = {"alpha$A", "beta$B", "gamma$C", "delta$D", "epsilon", "zeta", "eta$E"};
    char line[256], *found;
    size_t used = 0;
    uint32_t n, result = $CALL;
    for (n = 0; n < 12 && used < sizeof line - 40; n++) {
        const char *word = words[mix(a, n) % 7];
        int added = snprintf(line + used, sizeof line - used, "%s%s=%u", n ? ";" : "", word, (b + n) % $D);
        if (added < 0)
            return result;
        used += (size_t)added;
    }
    for (found = line; (found = strchr(found, ';')) != NULL; found++) {
        result = mix(result, (uint32_t)(found - line));
        if (strncmp(found + 1, "beta", 4) == 0)
            *found = '!';
    }
    for (found = line; *found; found++)
        if (*found >= 'a' && *found <= 'z')
            *found = (char)('a' + (*found - 'a' + $A) % 26);
    if (strstr(line, "$B"))
        result += $E;
    return mix(result, (uint32_t)strlen(line));
}
"#,
    // Recursion with a table of results.
    r#"static uint32_t paths$N(uint32_t x, uint32_t y, uint32_t known[16][16])
{
    uint32_t result;
    if (x == 0 || y == 0)
        return 1;
    if (known[x][y])
        return known[x][y];
    result = paths$N(x - 1, y, known) + paths$N(x, y - 1, known);
    if ((x * $B + y) % $A == 0)
        result += paths$N(x - 1, y - 1, known) * $C;
    known[x][y] = result | 1;
    return known[x][y];
}

static uint32_t f$N(uint32_t a, uint32_t b)
{
    uint32_t known[16][16];
    memset(known, 0, sizeof known);
    return mix(paths$N(a % 15 + 1, b % 15 + 1, known), $CALL);
}
"#,
    // Bits, rotations, a small cipher.
    r#"static uint64_t round$N(uint64_t state, unsigned n)
{
    state ^= state << $A;
    state ^= state >> $B;
    state = (state << (n % 31 + 1)) | (state >> (63 - n % 31));
    switch (state & 7) {
    case 0: return state * 0x$Eull;
    case 1: return ~state + $E;
    case 2: return state ^ (state >> 32) ^ $Dull << $C % 64;
    case 3: return state - ($E + n);
    case 4: return (state & 0xff00ff00ff00ff00ull) >> 8 | (state & 0x00ff00ff00ff00ffull) << 8;
    case 5: return state + (uint64_t)__builtin_popcountll(state) * $D;
    default: return state ^ n * $Eull;
    }
}

static uint32_t f$N(uint32_t a, uint32_t b)
{
    uint64_t state = ((uint64_t)a << 32 | b) + $E;
    unsigned n;
    for (n = 0; n < $D; n++)
        state = round$N(state, n);
    return mix((uint32_t)(state ^ state >> 32), $CALL);
}
"#,
    // A sort with a comparison, and a search.
    r#"static int compare$N(const void *left, const void *right)
{
    const struct item *a = left, *b = right;
    if (a->key % $B != b->key % $B)
        return a->key % $B < b->key % $B ? -1 : 1;
    return a->count < b->count ? -1 : a->count > b->count;
}

static uint32_t f$N(uint32_t a, uint32_t b)
{
    struct item items[$C];
    uint32_t n, low = 0, high = sizeof items / sizeof items[0], result = $CALL;
    for (n = 0; n < high; n++) {
        items[n].key = mix(a, n * $Du) % 1000;
        items[n].count = n;
        items[n].weight = n / ($A + 1.0);
        items[n].name[0] = (char)('a' + n % 26);
    }
    qsort(items, high, sizeof items[0], compare$N);
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (items[middle].key % $D < b % $D)
            low = middle + 1;
        else
            high = middle;
    }
    for (n = 0; n < sizeof items / sizeof items[0]; n++)
        result = mix(result, items[n].key + (uint32_t)items[n].weight + (uint32_t)items[n].name[0]);
    return result + low;
}
"#,
    // Arrays of integers: sums, a filter, a histogram, loops that a compiler makes vectors of.
    r#"static uint32_t f$N(uint32_t a, uint32_t b)
{
    uint32_t values[128], histogram[16] = {0}, n, m, result = $CALL;
    float floats[128], most = 0;
    for (n = 0; n < 128; n++) {
        values[n] = (a + n * $E) ^ b >> (n % $A);
        floats[n] = (float)(values[n] % $E) * 0.$Bf;
    }
    for (n = 1; n < 127; n++)
        values[n] = (values[n - 1] >> 2) + (values[n] >> 1) + (values[n + 1] >> 2);
    for (n = 0; n < 128; n++) {
        histogram[values[n] % 16]++;
        if (floats[n] > most)
            most = floats[n];
    }
    for (n = 0; n < 16; n++)
        for (m = n + 1; m < 16; m++)
            if (histogram[n] < histogram[m]) {
                uint32_t other = histogram[n];
                histogram[n] = histogram[m];
                histogram[m] = other + (n == $A);
            }
    for (n = 0; n < 16; n++)
        result = result * $D + histogram[n];
    return mix(result, (uint32_t)most);
}
"#,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_as_long_as_asked_and_the_same_each_time() {
        let text = program(20_000);
        assert!((20_000..21_500).contains(&text.lines().count()), "{} lines", text.lines().count());
        assert_eq!(text, program(20_000));
        assert!(!text.contains('$'), "a placeholder is left");
    }
}
