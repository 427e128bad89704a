// Words and the ids that someone else found for them. words.py says what a word is and what the arguments are.

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace {

constexpr size_t LONGEST = 64;  // bytes of a word that is kept
constexpr size_t PROBES = 32;   // slots looked at for a word: text made to collide loses the speed, nothing else

bool inside_character(uint8_t byte) { return (byte & 0xC0) == 0x80; }

// The bytes of the character at `at`, at most four, as one number; `at` moves behind it.
uint32_t take(const uint8_t*& at, const uint8_t* end) {
    uint32_t character = *at++;
    for (int more = 0; more < 3 && at < end && inside_character(*at); more++) character = character << 8 | *at++;
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

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "Word::head takes the first bytes in memory for the low ones of a number"
#endif

// A word, its first eight bytes as a number (zeros behind the end of a shorter one) and a hash of all of it.
struct Word {
    const uint8_t* text;
    size_t length;
    uint64_t head = 0, hash;

    // `end` is that of the text around it.
    Word(const uint8_t* text, size_t length, const uint8_t* end) : text(text), length(length) {
        if (end - text < 8) std::memcpy(&head, text, size_t(end - text));
        else std::memcpy(&head, text, 8);
        if (length < 8) head &= (uint64_t(1) << 8 * length) - 1;
        hash = (head ^ length) * 0x9E3779B97F4A7C15;
        for (size_t i = 8; i < length; i++) hash = (hash ^ text[i]) * 0x100000001b3;
        hash ^= hash >> 32;
    }
};

struct Slot {
    uint64_t head;
    uint32_t length, count;  // bytes and ids; length 0: free
    uint32_t text, ids;      // where they begin in Table::text and Table::ids
    int32_t first;           // id, if there is one: most words have no other
};

struct Table {
    std::vector<Slot> slots = std::vector<Slot>(1024);  // a power of two, at most half full
    std::vector<uint8_t> text;
    std::vector<int32_t> ids;
    size_t words = 0, most;

    explicit Table(size_t most) : most(most) {}

    // The slot of a word, or the free one where it belongs, or null where all probes hold others.
    const Slot* find(const Word& word) const {
        for (size_t probe = 0; probe < PROBES; probe++) {
            const Slot& slot = slots[(word.hash + probe) & (slots.size() - 1)];
            if (slot.length == 0 || holds(slot, word)) return &slot;
        }
        return nullptr;
    }

    bool holds(const Slot& slot, const Word& word) const {
        return slot.head == word.head && slot.length == word.length &&
               (word.length <= 8 || std::memcmp(&text[slot.text], word.text, word.length) == 0);
    }

    // Remember a word. A full table is emptied first; long words and unlucky ones are not kept.
    void add(const Word& word, const int32_t* found, size_t count) {
        if (word.length == 0 || word.length > LONGEST || count > word.length) return;
        if (words == most) *this = Table(most);
        if (2 * (words + 1) > slots.size()) grow();
        auto slot = const_cast<Slot*>(find(word));
        if (slot == nullptr || slot->length) return;
        *slot = {word.head, uint32_t(word.length), uint32_t(count), uint32_t(text.size()), uint32_t(ids.size()),
                 count ? *found : 0};
        text.insert(text.end(), word.text, word.text + word.length);
        ids.insert(ids.end(), found, found + count);
        words++;
    }

    void grow() {
        std::vector<Slot> old(2 * slots.size());
        old.swap(slots);
        for (const Slot& slot : old) {
            if (slot.length == 0) continue;
            Word word(&text[slot.text], slot.length, text.data() + text.size());
            if (auto place = const_cast<Slot*>(find(word))) *place = slot;
        }
    }
};

struct Words {
    Pairs joined;
    Table table;

    // May text be cut at `at`, between two characters that follow one another in no piece?
    bool cut_at(const uint8_t* begin, const uint8_t* at, const uint8_t* end) const {
        if (at == end) return true;
        if (inside_character(*at)) return false;
        const uint8_t* back = at - 1;
        while (back > begin && at - back < 4 && inside_character(*back)) back--;
        uint32_t left = take(back, at);
        return !joined.has(left, take(at, end));
    }

    // Bit i: may text be cut behind at[i]? All 64 at once, because a CPU cannot guess how long a word is.
    uint64_t cuts(const uint8_t* begin, const uint8_t* at, const uint8_t* end) const {
        uint64_t cuts = 0;
        uint8_t bits = 0x80;
        if (end - at > 64) {
            bits = 0;
            for (int i = 0; i <= 64; i++) bits |= at[i];
        }
        if (bits < 0x80)
            for (int i = 0; i < 64; i++) cuts |= uint64_t(!joined.ascii[at[i]][at[i + 1]]) << i;
        else
            for (int i = 0; i < 64 && at + i < end; i++) cuts |= uint64_t(cut_at(begin, at + i + 1, end)) << i;
        return cuts;
    }

    // Calls word(begin, end) for every word of a text.
    template <class Call>
    void each_word(const uint8_t* begin, const uint8_t* end, Call word) const {
        const uint8_t* start = begin;
        for (const uint8_t* block = begin; block < end; block += end - block < 64 ? end - block : 64)
            for (uint64_t rest = cuts(begin, block, end); rest; rest &= rest - 1) {
                const uint8_t* next = block + __builtin_ctzll(rest) + 1;
                word(start, next);
                start = next;
            }
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
        words->each_word(text + bounds[t], text + bounds[t + 1], [&](const uint8_t* at, const uint8_t* next) {
            Word word(at, size_t(next - at), text + bounds[texts]);
            const Table* table = &words->table;
            const Slot* slot = table->find(word);
            if (slot == nullptr || slot->length == 0) {
                table = &unknown;
                slot = table->find(word);
            }
            if (slot && slot->length) {
                if (slot->count) *out++ = slot->first;
                for (uint32_t i = 1; i < slot->count; i++) *out++ = table->ids[slot->ids + i];
                return;
            }
            *out = int32_t(~*misses);
            unknown.add(word, out++, 1);
            missing[2 * *misses] = at - text;
            missing[2 * *misses + 1] = next - text;
            ++*misses;
        });
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
        Word word(text + bounds[i], size_t(bounds[i + 1] - bounds[i]), text + bounds[count]);
        words->table.add(word, ids + id_bounds[i], size_t(id_bounds[i + 1] - id_bounds[i]));
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
