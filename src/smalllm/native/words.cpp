// Words and the ids that someone else found for them. words.py says what a word is and what the arguments are.

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace {

constexpr size_t LONGEST = 64;  // bytes of a word that is kept
constexpr size_t PROBES = 32;   // slots looked at for a word: text made to collide loses the speed, nothing else

// The bytes of the character at `at` as one number; `at` moves behind it. Bytes that are not UTF-8 give some number too.
uint32_t take(const uint8_t*& at, const uint8_t* end) {
    uint32_t character = *at++;
    if (character >= 0x80)
        for (int more = 0; more < 3 && at < end && (*at & 0xC0) == 0x80; more++) character = character << 8 | *at++;
    return character;
}

// Pairs of characters. Of pairs that were never added it may claim some: then a word is longer than it could be.
struct Pairs {
    uint8_t ascii[128][128] = {};
    std::vector<bool> others = std::vector<bool>(1 << 20);

    static size_t place(uint32_t left, uint32_t right) { return (left * 0x9E3779B1u ^ right * 0x85EBCA77u) >> 12; }

    void add(uint32_t left, uint32_t right) {
        if ((left | right) < 128) ascii[left][right] = 1;
        else others[place(left, right)] = true;
    }

    bool has(uint32_t left, uint32_t right) const {
        return (left | right) < 128 ? ascii[left][right] : others[place(left, right)];
    }
};

uint64_t hash_of(const uint8_t* word, size_t length) {  // FNV-1a
    uint64_t hash = 0xcbf29ce484222325;
    for (size_t i = 0; i < length; i++) hash = (hash ^ word[i]) * 0x100000001b3;
    return hash ^ hash >> 32;
}

struct Slot {
    uint32_t text, ids;      // where they begin in Table::text and Table::ids
    uint32_t length, count;  // bytes and ids; length 0: free
};

struct Table {
    std::vector<Slot> slots = std::vector<Slot>(1024);  // a power of two, at most half full
    std::vector<uint8_t> text;
    std::vector<int32_t> ids;
    size_t words = 0, most;

    explicit Table(size_t most) : most(most) {}

    // The slot of a word, or the free one where it belongs, or null where all probes hold others.
    const Slot* find(const uint8_t* word, size_t length, uint64_t hash) const {
        for (size_t probe = 0; probe < PROBES; probe++) {
            const Slot& slot = slots[(hash + probe) & (slots.size() - 1)];
            if (slot.length == 0) return &slot;
            if (slot.length == length && std::memcmp(&text[slot.text], word, length) == 0) return &slot;
        }
        return nullptr;
    }

    // Remember a word. A full table is emptied first; long words and unlucky ones are not kept.
    void add(const uint8_t* word, size_t length, uint64_t hash, const int32_t* found, size_t count) {
        if (length == 0 || length > LONGEST || count > length) return;
        if (words == most) *this = Table(most);
        if (2 * (words + 1) > slots.size()) grow();
        auto slot = const_cast<Slot*>(find(word, length, hash));
        if (slot == nullptr || slot->length) return;
        *slot = {uint32_t(text.size()), uint32_t(ids.size()), uint32_t(length), uint32_t(count)};
        text.insert(text.end(), word, word + length);
        ids.insert(ids.end(), found, found + count);
        words++;
    }

    void grow() {
        std::vector<Slot> old(2 * slots.size());
        old.swap(slots);
        for (const Slot& slot : old) {
            if (slot.length == 0) continue;
            const uint8_t* word = &text[slot.text];
            if (auto place = const_cast<Slot*>(find(word, slot.length, hash_of(word, slot.length)))) *place = slot;
        }
    }
};

struct Words {
    Pairs joined;
    Table table;

    // Where the word that begins at `at` ends: before a character that follows the one before it in no piece.
    const uint8_t* end_of_word(const uint8_t* at, const uint8_t* end) const {
        uint32_t left = take(at, end);
        while (at < end) {
            const uint8_t* next = at;
            uint32_t right = take(next, end);
            if (!joined.has(left, right)) break;
            at = next, left = right;
        }
        return at;
    }
};

}  // namespace

extern "C" {

// Returns null without memory.
Words* words_new(const uint8_t* pieces, const int64_t* bounds, int64_t count, int64_t most) try {
    auto words = new Words{{}, Table(size_t(most))};
    for (int64_t i = 0; i < count; i++) {
        const uint8_t *at = pieces + bounds[i], *end = pieces + bounds[i + 1];
        for (uint32_t left = at < end ? take(at, end) : 0; at < end;) {
            uint32_t right = take(at, end);
            words->joined.add(left, right);
            left = right;
        }
    }
    return words;
} catch (const std::bad_alloc&) {
    return nullptr;
}

void words_free(Words* words) { delete words; }

int64_t words_count(const Words* words) { return int64_t(words->table.words); }

// Returns the number of ids, or -1 without memory.
int64_t words_look_up(const Words* words, const uint8_t* text, const int64_t* bounds, int64_t texts,
                      const int32_t* frames, int32_t* ids, int64_t* counts, int64_t* missing, int64_t* misses) try {
    Table unknown(SIZE_MAX);  // words that the table lacks: their numbers ~0, ~1, ...
    int32_t* out = ids;
    *misses = 0;
    for (int64_t t = 0; t < texts; t++) {
        const int32_t* first = out;
        if (frames[2 * t] >= 0) *out++ = frames[2 * t];
        const uint8_t *word = text + bounds[t], *end = text + bounds[t + 1], *next;
        for (; word < end; word = next) {
            next = words->end_of_word(word, end);
            size_t length = size_t(next - word);
            uint64_t hash = hash_of(word, length);
            const Table* table = &words->table;
            const Slot* slot = table->find(word, length, hash);
            if (slot == nullptr || slot->length == 0) {
                table = &unknown;
                slot = table->find(word, length, hash);
            }
            if (slot && slot->length) {
                const int32_t* known = table->ids.data() + slot->ids;
                for (uint32_t i = 0; i < slot->count; i++) *out++ = known[i];
                continue;
            }
            *out = int32_t(~*misses);
            unknown.add(word, length, hash, out++, 1);
            missing[2 * *misses] = word - text;
            missing[2 * *misses + 1] = next - text;
            ++*misses;
        }
        if (frames[2 * t + 1] >= 0) *out++ = frames[2 * t + 1];
        counts[t] = out - first;
    }
    return out - ids;
} catch (const std::bad_alloc&) {
    return -1;
}

// Returns 0, or -1 without memory.
int64_t words_add(Words* words, const uint8_t* text, const int64_t* bounds, const int32_t* ids,
                  const int64_t* id_bounds, int64_t count) try {
    for (int64_t i = 0; i < count; i++) {
        const uint8_t* word = text + bounds[i];
        size_t length = size_t(bounds[i + 1] - bounds[i]), size = size_t(id_bounds[i + 1] - id_bounds[i]);
        words->table.add(word, length, hash_of(word, length), ids + id_bounds[i], size);
    }
    return 0;
} catch (const std::bad_alloc&) {
    return -1;
}

// Returns the number of ids, or -1 if there are more than `room`.
int64_t words_fill(const int32_t* ids, int64_t* counts, int64_t texts, const int32_t* found, const int64_t* bounds,
                   int32_t* filled, int64_t room) {
    int64_t used = 0;
    for (int64_t t = 0; t < texts; t++) {
        int64_t first = used;
        for (int64_t i = 0; i < counts[t]; i++, ids++) {
            bool known = *ids >= 0;
            const int32_t* from = known ? ids : found + bounds[~*ids];
            int64_t size = known ? 1 : bounds[~*ids + 1] - bounds[~*ids];
            if (size > room - used) return -1;
            for (int64_t k = 0; k < size; k++) filled[used++] = from[k];
        }
        counts[t] = used - first;
    }
    return used;
}
}
