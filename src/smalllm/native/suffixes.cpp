// The suffix array of a text of symbols, and the longest matches of a query in it. suffixes.py says what the arguments are.
//
// Sorting by induction: G. Nong, S. Zhang, W. H. Chan, "Two Efficient Algorithms for Linear Time Suffix Array
// Construction", IEEE Transactions on Computers 60(10), 2011 (SA-IS). Beside text and order it needs a bit for each symbol
// and a number for each kind of symbol; the recursion works inside `order`, but its kinds may be half as many as symbols.

#include <cstdint>
#include <new>
#include <vector>

namespace {

template <class Symbol>
struct Sorter {
    const Symbol* text;  // ends with a 0 that stands nowhere else
    int32_t* order;
    const int32_t size;
    std::vector<bool> small;  // whether the suffix is smaller than the one after it
    std::vector<int32_t> buckets;  // for each kind of symbol a place in `order`

    Sorter(const Symbol* text, int32_t* order, int32_t size, int32_t kinds)
        : text(text), order(order), size(size), small(size), buckets(kinds) {
        small[size - 1] = true;
        for (int32_t i = size - 2; i >= 0; i--)
            small[i] = text[i] < text[i + 1] || (text[i] == text[i + 1] && small[i + 1]);
    }

    // Whether a suffix is the leftmost of a run of smaller ones: those are sorted first, the others follow from them.
    bool leftmost(int32_t i) const { return i > 0 && small[i] && !small[i - 1]; }

    void count() {  // each time anew: counts that are kept would be as large as the buckets
        buckets.assign(buckets.size(), 0);
        for (int32_t i = 0; i < size; i++) buckets[text[i]]++;
    }

    void to_starts() {
        count();
        int32_t sum = 0;
        for (int32_t& bucket : buckets) {
            int32_t own = bucket;
            bucket = sum;
            sum += own;
        }
    }

    void to_ends() {
        count();
        int32_t sum = 0;
        for (int32_t& bucket : buckets) bucket = sum += bucket;
    }

    void induce() {
        to_starts();
        for (int32_t i = 0; i < size; i++) {
            int32_t before = order[i] - 1;
            if (before >= 0 && !small[before]) order[buckets[text[before]]++] = before;
        }
        to_ends();
        for (int32_t i = size - 1; i >= 0; i--) {
            int32_t before = order[i] - 1;
            if (before >= 0 && small[before]) order[--buckets[text[before]]] = before;
        }
    }

    // Whether the stretches from two leftmost suffixes to the next leftmost ones are equal.
    bool alike(int32_t one, int32_t other) const {
        for (int32_t d = 0;; d++) {
            if (text[one + d] != text[other + d] || small[one + d] != small[other + d]) return false;
            if (d > 0 && (leftmost(one + d) || leftmost(other + d))) return true;
        }
    }

    void sort();
};

template <class Symbol>
void suffix_sort(const Symbol* text, int32_t* order, int32_t size, int32_t kinds) {
    if (size == 1) {
        order[0] = 0;
        return;
    }
    Sorter<Symbol>(text, order, size, kinds).sort();
}

template <class Symbol>
void Sorter<Symbol>::sort() {
    to_ends();
    for (int32_t i = 0; i < size; i++) order[i] = -1;
    for (int32_t i = 1; i < size; i++)
        if (leftmost(i)) order[--buckets[text[i]]] = i;
    induce();

    int32_t found = 0, names = 0, last = -1;
    for (int32_t i = 0; i < size; i++)
        if (leftmost(order[i])) order[found++] = order[i];
    for (int32_t i = found; i < size; i++) order[i] = -1;
    for (int32_t i = 0; i < found; i++) {  // leftmost suffixes are never neighbours, so half the places do
        int32_t place = order[i];
        if (last < 0 || !alike(place, last)) names++, last = place;
        order[found + place / 2] = names - 1;
    }
    for (int32_t i = size - 1, to = size - 1; i >= found; i--)
        if (order[i] >= 0) order[to--] = order[i];

    int32_t* named = order + size - found;
    if (names < found) suffix_sort<int32_t>(named, order, found, names);
    else
        for (int32_t i = 0; i < found; i++) order[named[i]] = i;

    to_ends();
    for (int32_t i = 1, to = 0; i < size; i++)
        if (leftmost(i)) named[to++] = i;
    for (int32_t i = 0; i < found; i++) order[i] = named[order[i]];
    for (int32_t i = found; i < size; i++) order[i] = -1;
    for (int32_t i = found - 1; i >= 0; i--) {
        int32_t place = order[i];
        order[i] = -1;
        order[--buckets[text[place]]] = place;
    }
    induce();
}

template <class Symbol>
int64_t sorted(const Symbol* text, int32_t* order, int64_t size, int64_t kinds) {
    try {
        suffix_sort<Symbol>(text, order, int32_t(size), int32_t(kinds));
    } catch (const std::bad_alloc&) {
        return -1;
    }
    return 0;
}

// For each place of the query the longest beginning of what follows there that the text holds. A search by halves meets both
// neighbours of the place where the query would stand, and one of them shares the most with it.
template <class Symbol>
void longest(const Symbol* text, const int32_t* order, int64_t size, const Symbol* query, int64_t length,
             int32_t* lengths, int32_t* places) {
    for (int64_t from = 0; from < length; from++) {
        int64_t low = 0, high = size, shared_low = 0, shared_high = 0, best = 0, place = 0;
        while (high - low > 1 && from + best < length) {
            int64_t middle = low + (high - low) / 2, shared = shared_low < shared_high ? shared_low : shared_high;
            const Symbol* suffix = text + order[middle];
            while (from + shared < length && suffix[shared] == query[from + shared]) shared++;
            if (shared > best) best = shared, place = order[middle];
            if (from + shared < length && suffix[shared] < query[from + shared]) low = middle, shared_low = shared;
            else high = middle, shared_high = shared;
        }
        lengths[from] = int32_t(best);
        places[from] = int32_t(place);
    }
}

}  // namespace

extern "C" {

int64_t suffixes_sort16(const uint16_t* text, int32_t* order, int64_t size, int64_t kinds) {
    return sorted(text, order, size, kinds);
}

int64_t suffixes_sort32(const int32_t* text, int32_t* order, int64_t size, int64_t kinds) {
    return sorted(text, order, size, kinds);
}

void suffixes_longest16(const uint16_t* text, const int32_t* order, int64_t size, const uint16_t* query, int64_t length,
                        int32_t* lengths, int32_t* places) {
    longest(text, order, size, query, length, lengths, places);
}

void suffixes_longest32(const int32_t* text, const int32_t* order, int64_t size, const int32_t* query, int64_t length,
                        int32_t* lengths, int32_t* places) {
    longest(text, order, size, query, length, lengths, places);
}
}
