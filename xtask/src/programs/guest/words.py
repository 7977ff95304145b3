"""Strings and dictionaries: words counted, sorted, joined, translated."""

syllables = ["ba", "ko", "ri", "mu", "ten", "sal", "vor", "e", "a", "um"]


def word(n):
    made = ""
    while n:
        made += syllables[n % 10]
        n //= 10
    return made


counts = {}
pairs = {}
before = ""
seed = 1
for _ in range(300000):
    seed = (seed * 48271) % 2147483647
    now = word(seed % 5000 * (seed % 7))
    counts[now] = counts.get(now, 0) + 1
    pairs[before, now[:3]] = len(now)
    before = now
ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
print(len(counts), len(pairs), ordered[:5])
text = " ".join(name for name, _ in ordered)
print(len(text.upper().replace("KO", "-").split("-")), text.count("mu"), hash(text.title().swapcase()))
print(len("".join(reversed(text)).translate({ord("a"): "å", ord("e"): None}).encode()))
print(sum(text.find(name) for name, _ in ordered[:2000]))
