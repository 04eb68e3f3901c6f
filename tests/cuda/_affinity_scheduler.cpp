// csrc/cuda/affinity/sm90/tile_scheduler.h and tiles.h for ctypes.
#include "affinity/sm90/tile_scheduler.h"
#include "affinity/sm90/tiles.h"

using namespace ercn::sm90::affinity;

extern "C" {

int64_t tiles(TileScheduler s) { return s.tiles(); }
int64_t slots(TileScheduler s) { return s.slots(); }
int64_t worker(TileScheduler s, int64_t position) { return s.worker(position); }
int64_t begin(TileScheduler s, int64_t worker) { return s.begin(worker); }

// From position first on, by spans: image, row block, column, whether a span begins there, slot of its partial sum.
void walk(TileScheduler s, int64_t first, int count, int64_t (*to)[5]) {
  WorkTile at = s.tile(first);
  for (int left = count; left > 0; at = s.next_row_block(at)) {
    const int span = s.span(at, left);
    for (int i = 0; i < span; ++i) {
      const int position = count - left + i;
      int64_t* row = to[position];
      row[0] = at.image, row[1] = at.row_block, row[2] = at.column + i, row[3] = i == 0;
      row[4] = s.worker(first + position) + s.ordinal(at.image, at.row_block);
    }
    left -= span;
  }
}

// Image, row block and column of one position.
void tile(TileScheduler s, int64_t position, int64_t* to) {
  const WorkTile at = s.tile(position);
  to[0] = at.image, to[1] = at.row_block, to[2] = at.column;
}

void slots_of_row_block(TileScheduler s, int64_t image, int row_block, int64_t* to) {
  to[0] = s.first_slot(image, row_block), to[1] = s.last_slot(image, row_block);
}

int first_column(TileScheduler s, int row_block) { return s.first_column(row_block); }

int64_t width(int64_t padded_pixels, int rows, int first_row_block) {
  return mirrored_width(padded_pixels, rows, first_row_block);
}
int band(int64_t bytes, int64_t maps, int64_t padded_pixels, int rows, int first_row_block) {
  return row_blocks_in_band(bytes, maps, padded_pixels, rows, first_row_block);
}
int64_t offset(
    TileScheduler s, int64_t width, int rows, int channels, int row_block, int64_t image, int channel, int64_t pixel) {
  return mirrored_offset(s, width, rows, channels, row_block, image, channel, pixel);
}

int rows_of_row_block(int dim) { return forward_rows(dim); }
int pixels_of_tile() { return kTileSide; }
int padded(int channels) { return padded_channels(channels); }

}  // extern "C"
