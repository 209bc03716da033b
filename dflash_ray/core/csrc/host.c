// Loops of the host over sequences and rows of a step, which as array operations take many passes over memory.
// Each has a twin in numpy, which says what it does, stands in where there is no C compiler, and is what it is tested
// against. Callers see to it that arrays are contiguous and of the types here; the interpreter's lock is not held.
#include <stdint.h>
#include <string.h>

enum { MIN_NGRAM = 2, MAX_NGRAM = 5, NUM_SIZES = 4 };
static const uint32_t MULTIPLIER = 0x9E3779B1u;

// core/ngram.py, NgramTable._enter: indexes followers starts[i], starts[i] + 1, ..., counts[i] of them, of rows[i].
void ngram_enter(const uint32_t *tokens, int64_t capacity, int32_t *heads, int32_t *earlier, const uint32_t *row_bits,
                 int64_t bucket_bits, int64_t ring_bits, const int64_t *rows, const int64_t *starts,
                 const int64_t *counts, int64_t n) {
  const int64_t in_ring = (INT64_C(1) << ring_bits) - 1;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = rows[i];
    const uint32_t *text = tokens + row * capacity, shift = 32 - row_bits[row];
    int32_t *row_heads = heads + (row * NUM_SIZES << bucket_bits);
    int32_t *row_earlier = earlier + (row << ring_bits) * NUM_SIZES;
    for (int64_t follower = starts[i]; follower < starts[i] + counts[i]; ++follower) {
      if (follower < MIN_NGRAM) continue;
      uint32_t hash = text[follower - 1] * MULTIPLIER;
      for (int64_t size = MIN_NGRAM; size <= MAX_NGRAM && size <= follower; ++size) {
        hash = (hash ^ text[follower - size]) * MULTIPLIER;
        int32_t *head = row_heads + ((size - MIN_NGRAM) << bucket_bits) + (hash >> shift);
        row_earlier[(follower & in_ring) * NUM_SIZES + size - MIN_NGRAM] = *head;
        *head = (int32_t)follower;
      }
    }
  }
}

// core/ngram.py, NgramTable._follow up to the drafts: the latest follower of the longest n-gram at the end of suffixes
// [n, MAX_NGRAM], the very last token first, that occurs in what is indexed; and its length. Both are 0 where none does.
void ngram_find(const uint32_t *tokens, int64_t capacity, const int32_t *heads, const int32_t *earlier,
                const uint32_t *row_bits, int64_t bucket_bits, int64_t ring_bits, int64_t window, const int64_t *high,
                const int64_t *rows, const int64_t *lens, const uint32_t *suffixes, const int64_t *suffix_lens,
                int64_t n, int64_t *found, int64_t *match_lens) {
  const int64_t in_ring = (INT64_C(1) << ring_bits) - 1;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = rows[i], start = lens[i] > window ? lens[i] - window : 0;
    const uint32_t *text = tokens + row * capacity, *suffix = suffixes + i * MAX_NGRAM, shift = 32 - row_bits[row];
    const int32_t *row_heads = heads + (row * NUM_SIZES << bucket_bits);
    const int32_t *row_earlier = earlier + (row << ring_bits) * NUM_SIZES;
    uint32_t hash = suffix[0] * MULTIPLIER;
    found[i] = match_lens[i] = 0;
    if (high[row] != lens[i]) continue;
    for (int64_t size = MIN_NGRAM; size <= MAX_NGRAM && size <= suffix_lens[i]; ++size) {
      hash = (hash ^ suffix[size - 1]) * MULTIPLIER;
      int64_t at = row_heads[((size - MIN_NGRAM) << bucket_bits) + (hash >> shift)];
      int64_t same = 0;
      while (at >= start + size) {
        for (same = 0; same < size && text[at - 1 - same] == suffix[same]; ++same) {
        }
        if (same == size) break;
        at = row_earlier[(at & in_ring) * NUM_SIZES + size - MIN_NGRAM];
      }
      if (same < size) break;  // what has no match of a size has none of a larger one
      found[i] = at;
      match_lens[i] = size;
    }
  }
}

// Copies sizes[i] bytes from `from` + sources[i] to `to` + places[i].
void copy_runs(uint8_t *to, const uint8_t *from, const int64_t *places, const int64_t *sources, const int64_t *sizes,
               int64_t n) {
  for (int64_t i = 0; i < n; ++i) memcpy(to + places[i], from + sources[i], (size_t)sizes[i]);
}

// target_group/batch.py, gather_rows: the rows of a pass, entry by entry. Of an entry that verifies, rows behind the
// first are drafts, which come one after the other in `drafts`; all others are the sequence's own tokens.
void gather_rows(const int32_t *tokens, int64_t max_tokens, const int64_t *pages, int64_t max_pages, int64_t page_size,
                 const int64_t *slots, const int64_t *starts, const int64_t *counts, const uint8_t *is_verify,
                 const int64_t *drafts, int64_t n, int64_t *token_ids, int64_t *places, int64_t *cache_rows) {
  int64_t row = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t *text = tokens + slots[i] * max_tokens;
    const int64_t *table = pages + slots[i] * max_pages;
    int64_t nth = starts[i] / page_size, in_page = starts[i] % page_size;
    for (int64_t offset = 0; offset < counts[i]; ++offset, ++row) {
      places[row] = starts[i] + offset;
      token_ids[row] = is_verify[i] && offset ? *drafts++ : text[starts[i] + offset];
      cache_rows[row] = table[nth] * page_size + in_page;
      if (++in_page == page_size) ++nth, in_page = 0;
    }
  }
}

// target_group/batch.py, page_tables: the first page_counts[i] pages of slots[i], one slot after the other.
void page_tables(const int64_t *pages, int64_t max_pages, const int64_t *slots, const int64_t *page_counts, int64_t n,
                 int64_t *tables) {
  for (int64_t i = 0; i < n; tables += page_counts[i++])
    memcpy(tables, pages + slots[i] * max_pages, (size_t)page_counts[i] * sizeof(int64_t));
}

// sampling/columns.py, chain_lines: [R, 4] as kernels/columns.py has RowColumn, of S sequences whose drafts are chains.
void chain_lines(const int64_t *num_rows, const int64_t *positions, const int64_t *token_ids, int64_t n,
                 int64_t *lines) {
  int64_t row = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t offset = 0; offset < num_rows[i]; ++offset, ++row, lines += 4) {
      lines[0] = i;
      lines[1] = positions[i] + offset + 1;
      lines[2] = token_ids[row];
      lines[3] = offset ? row - 1 : -1;
    }
}
