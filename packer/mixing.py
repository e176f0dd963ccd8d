"""A context mixer: the coder of pass 6 whose decoder ships with the text.

Each letter is seven binary decisions. Every context (the last letters, the word, the open bracket, ...) counts the
zeros and ones it saw at each decision; the logits of these counts, weighted, sum up to the logit of the next bit. The
weights are learnt on the way: a set for the letter's first bits, and one for the letter before it. A range coder turns
chances into digits of base 253, which a Latin-1 file holds unescaped. All numbers that decide are integers, and the
two tables come from + * / alone, so that every machine reads the same text.
"""

import bisect
import operator

SKIPPED = b"\0\r\\"  # bytes that Python would read otherwise than as themselves


def tables():
    """The chance of a one in 65536 by logit; by state its logit, and the states that follow a zero and a one."""
    chances, odds = [], 1.67e-5  # logits are 256ths, from -11 to 11
    while len(chances) < 5632:
        chances.append(int(65536 * odds / (1 + odds)))
        odds *= 1.003914
    more, less = [min(n + 1, 15) for n in range(16)], [min(n, n // 5 + 2) for n in range(16)]  # the other bit's fades
    pairs = [divmod(state, 16) for state in range(256)]  # zeros, ones
    logits = [bisect.bisect(chances, 65536 * (m + 0.16) / (n + m + 0.32)) - 2816 for n, m in pairs]
    after = [more[n] * 16 + less[m] for n, m in pairs], [less[n] * 16 + more[m] for n, m in pairs]
    return chances, logits, after


def contexts(text):
    """Before each letter of the growing `text`, the numbers of what it may depend on."""
    seen, brackets = {}, [0]
    letter = match = length = past = word = word_before = word_earlier = shape = 0
    while True:
        bracket = brackets[-1]
        yield (
            len(brackets),
            letter,
            past % 2**16,
            past % 2**24,
            past % 2**32,
            word,
            word_earlier * 3**99 + word * 256 + letter,
            shape,
            bracket % 256 + shape % 2**32 * 256,
            bracket % 2**16 * 256 + letter,
            bracket * 256 + letter,
            length and text[match] * 16 + min(length, 16),
        )
        kind = letter = text[-1]
        past = (past * 256 + letter) % 2**40
        length = length + 1 if length and text[match] == letter else 0
        match += 1
        if not length:  # the last place that ends in the same five letters
            match = seen.get(past, 0)
            while match > length < 16 and text[match - 1 - length] == text[-1 - length]:
                length += 1
        seen[past] = len(text)
        if f"_{chr(letter)}".isidentifier():
            word, kind = word * 256 + letter, 1
        elif word:
            word_earlier, word_before, word = word_before, word, 0
        if kind > 10:  # outside of brackets, the line's first word stands for the one that opened them
            brackets[0] = brackets[0] or word_before * 2**16
        shape = (shape * 256 + kind) % 2**48
        if letter in b"([{":
            brackets.append(word_before * 2**16 + letter)
        if letter in b")]}":
            brackets[1:] = brackets[1:-1]
        if letter == 10:
            brackets = [0]
        if letter == 44 and brackets[1:]:
            brackets[-1] += 256


def spell(size, bit):
    """A text of `size` letters, whose bits `bit` knows, given the chance of a one in 65536."""
    chances, logits, after = tables()
    states, text = bytearray(1 << 25), bytearray()
    by_node, by_letter = ([[26000] * 12 for _ in range(256)] for _ in range(2))
    numbers = contexts(text)
    while len(text) < size:
        told = next(numbers)
        rows = [(number * 16 + i) * 3**50 % 33554177 for i, number in enumerate(told)]
        node, late = 1, by_letter[told[1] + 128 * (told[-1] > 0)]  # told[-1]: a letter is expected
        while node < 128:
            places = [row + node for row in rows]
            found = [states[place] for place in places]
            hints = [logits[state] for state in found]
            early = by_node[node]
            logit = sum(map(operator.mul, early, hints)) + sum(map(operator.mul, late, hints)) >> 18
            chance = chances[max(-2816, min(2815, logit)) + 2816]
            one = bit(chance)
            miss = one * 65536 - chance
            if miss * miss > 1e6:
                for weights in early, late:
                    weights[:] = [w + (h * miss * 3 >> 15) for w, h in zip(weights, hints)]
            for place, state in zip(places, found):
                states[place] = after[one][state]
            node += node + one
        text.append(node - 128)
    return text


def reader(digits):
    """The bits that `digits` hold, one per call."""
    digits, span, value = iter(digits), 1, 0

    def bit(chance):
        nonlocal span, value
        while span < 2**32:
            digit = ord(next(digits))
            span, value = span * 253, value * 253 + digit - 1 - (digit > 13) - (digit > 92)
        part = span * chance >> 16
        if value < part:
            span = part
            return 1
        span, value = span - part, value - part
        return 0

    return bit


def mixed(letters):
    """The digits of `letters`, which are below 128."""
    bits = iter([letter >> place & 1 for letter in letters for place in range(6, -1, -1)])
    span, low, size = 1, 0, 0

    def bit(chance):
        nonlocal span, low, size
        while span < 2**32:
            span, low, size = span * 253, low * 253, size + 1
        part = span * chance >> 16
        one = next(bits)
        span, low = (part, low) if one else (span - part, low + part)
        return one

    spell(len(letters), bit)
    alphabet = [n for n in range(256) if n not in SKIPPED]
    digits = bytearray()
    for _ in range(size):
        low, digit = divmod(low, 253)
        digits.append(alphabet[digit])
    return bytes(reversed(digits))
