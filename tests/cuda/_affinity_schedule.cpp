// csrc/cuda/affinity/sm90/schedule.h and affinity_tiles.h for ctypes.
#include "affinity/sm90/schedule.h"
#include "affinity/sm90/tiles.h"

using namespace ercn::sm90::affinity;

extern "C" {

int64_t tiles(Schedule s) { return s.tiles(); }
int64_t slots(Schedule s) { return s.slots(); }
int64_t worker(Schedule s, int64_t position) { return s.worker(position); }
int64_t begin(Schedule s, int64_t worker) { return s.begin(worker); }

// From position first on, by segments: image, group, column, whether a group begins there, slot of its worker's sum.
void walk(Schedule s, int64_t first, int count, int64_t (*to)[5]) {
  Tile at = s.tile(first);
  for (int left = count; left > 0; at = s.next_group(at)) {
    const int segment = s.segment(at, left);
    for (int i = 0; i < segment; ++i) {
      const int position = count - left + i;
      int64_t* row = to[position];
      row[0] = at.image, row[1] = at.group, row[2] = at.column + i, row[3] = i == 0;
      row[4] = s.worker(first + position) + s.ordinal(at.image, at.group);
    }
    left -= segment;
  }
}

// Image, group and column of one position.
void tile(Schedule s, int64_t position, int64_t* to) {
  const Tile at = s.tile(position);
  to[0] = at.image, to[1] = at.group, to[2] = at.column;
}

void slots_of_group(Schedule s, int64_t image, int group, int64_t* to) {
  to[0] = s.first_slot(image, group), to[1] = s.last_slot(image, group);
}

int first_column(Schedule s, int group) { return s.first_column(group); }

int64_t width(int64_t padded_pixels, int rows, int first_group) {
  return mirrored_width(padded_pixels, rows, first_group);
}
int band(int64_t bytes, int64_t maps, int64_t padded_pixels, int rows, int first_group) {
  return groups_in_band(bytes, maps, padded_pixels, rows, first_group);
}
int64_t offset(
    Schedule s, int64_t width, int rows, int channels, int group, int64_t image, int channel, int64_t pixel) {
  return mirrored_offset(s, width, rows, channels, group, image, channel, pixel);
}

int rows_of_group(int dim) { return forward_rows(dim); }
int pixels_of_tile() { return kPixels; }
int padded(int channels) { return padded_channels(channels); }

}  // extern "C"
