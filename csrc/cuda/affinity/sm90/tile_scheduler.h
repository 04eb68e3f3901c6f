#pragma once
// The tile scheduler: which worker (a persistent block of threads) has which tiles of A, and the slots of the partial
// sums in the workspace. For host and device.
//
// The pixels of an image are A's rows, in row blocks, and A's columns, in tiles; a row block is a whole number of tiles
// high. The tiles of all images, by row blocks and from left to right, are one sequence, of which every worker has an
// equal share. A worker's tiles of one row block are a span: it ends in one partial sum of the row block.
#include <arch/host_device.h>

#include <cstdint>

namespace ercn::sm90::affinity {

struct WorkTile {
  int image, row_block, column;  // column counts tiles
};

struct TileScheduler {
  int64_t images;
  int columns;          // tiles in a row of A
  int first_row_block;  // of row_blocks in every image
  int row_blocks;
  int step;             // a triangle's row block begins `step` tiles, its height, after the one above; else 0
  int64_t workers;

  // Tiles of an image above its row block first_row_block + i.
  ERCN_HOST_DEVICE int64_t before(int64_t i) const {
    return i * (columns - static_cast<int64_t>(step) * first_row_block) - step * (i * (i - 1) / 2);
  }
  ERCN_HOST_DEVICE int64_t tiles() const { return images * before(row_blocks); }

  ERCN_HOST_DEVICE int first_column(int row_block) const { return step * row_block; }

  ERCN_HOST_DEVICE WorkTile tile(int64_t position) const {
    const int64_t image = position / before(row_blocks), rest = position % before(row_blocks);
    int low = 0, high = row_blocks;  // before(low) <= rest < before(high)
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (before(middle) <= rest ? low : high) = middle;
    }
    const int row_block = first_row_block + low;
    return {static_cast<int>(image), row_block, first_column(row_block) + static_cast<int>(rest - before(low))};
  }

  // Of a worker's `left` tiles from `at` on, those in at's row block.
  ERCN_HOST_DEVICE int span(const WorkTile& at, int left) const {
    const int in_row_block = columns - at.column;
    return left < in_row_block ? left : in_row_block;
  }

  // The first tile of the next row block.
  ERCN_HOST_DEVICE WorkTile next_row_block(const WorkTile& at) const {
    const bool last = at.row_block + 1 == first_row_block + row_blocks;
    const int row_block = last ? first_row_block : at.row_block + 1;
    return {last ? at.image + 1 : at.image, row_block, first_column(row_block)};
  }

  // Positions [begin(w), begin(w + 1)) are worker w's.
  ERCN_HOST_DEVICE int64_t begin(int64_t worker) const { return worker * tiles() / workers; }
  ERCN_HOST_DEVICE int64_t worker(int64_t position) const { return ((position + 1) * workers - 1) / tiles(); }

  // A span begins where a worker or a row block does, so worker + ordinal grows from each span to the next: it is the
  // slot of the span's partial sum. A row block's slots are [first_slot, last_slot], without gaps.
  ERCN_HOST_DEVICE int64_t ordinal(int64_t image, int row_block) const {
    return image * row_blocks + row_block - first_row_block;
  }
  ERCN_HOST_DEVICE int64_t slots() const { return workers + images * row_blocks - 1; }
  ERCN_HOST_DEVICE int64_t first_slot(int64_t image, int row_block) const {
    const int64_t first = image * before(row_blocks) + before(row_block - first_row_block);
    return worker(first) + ordinal(image, row_block);
  }
  ERCN_HOST_DEVICE int64_t last_slot(int64_t image, int row_block) const {
    const int64_t last = image * before(row_blocks) + before(row_block - first_row_block + 1) - 1;
    return worker(last) + ordinal(image, row_block);
  }
};

// The mirrored sums of a band of row blocks, for the pixels beyond its first row block: [row blocks, images, channels,
// width] in fp32. A row block writes those of the pixels beyond itself.
ERCN_HOST_DEVICE int64_t mirrored_width(int64_t padded_pixels, int block_rows, int first_row_block) {
  const int64_t width = padded_pixels - (first_row_block + INT64_C(1)) * block_rows;
  return width > 0 ? width : 0;
}

// The offset of a row block's mirrored sum for a pixel; the next pixels follow.
ERCN_HOST_DEVICE int64_t mirrored_offset(
    const TileScheduler& s, int64_t width, int block_rows, int channels, int row_block, int64_t image, int channel,
    int64_t pixel) {
  const int64_t map = ((row_block - s.first_row_block) * s.images + image) * channels + channel;
  return map * width + pixel - (s.first_row_block + INT64_C(1)) * block_rows;
}

// The row blocks from first_row_block on whose mirrored sums fit `bytes`, at least one. maps: images · channels.
ERCN_HOST_DEVICE int row_blocks_in_band(
    int64_t bytes, int64_t maps, int64_t padded_pixels, int block_rows, int first_row_block) {
  const int left = static_cast<int>((padded_pixels + block_rows - 1) / block_rows) - first_row_block;
  const int64_t each = 4 * maps * mirrored_width(padded_pixels, block_rows, first_row_block);
  const int64_t fit = each == 0 ? left : bytes / each;
  return static_cast<int>(fit < 1 ? 1 : fit < left ? fit : left);
}

}  // namespace ercn::sm90::affinity
