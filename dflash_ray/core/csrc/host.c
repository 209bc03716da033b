// Loops of the target's host over a step's sequences and rows, which as array operations take many passes over memory,
// or hold the interpreter's lock. Each has a twin in numpy, which stands in where there is no C compiler, and passes the
// same tests. Callers see to it that arrays are contiguous and of the types here.
#include <stdint.h>
#include <string.h>

// target_group/feature_store.py, copy_runs: sizes[i] bytes from `from` + sources[i] to `to` + places[i].
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
