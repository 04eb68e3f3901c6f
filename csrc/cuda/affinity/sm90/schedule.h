#pragma once
// Which block of threads works on which tiles of A, and where the sums that it leaves behind lie. For the host too.
//
// An image's pixels are rows of A in groups and columns of A in tiles; groups are a whole number of tiles high. The
// tiles of all images, group by group and each group from left to right, are one sequence, of which every block of
// threads takes an equal share. The tiles of one group in one block are a segment: it ends in one partial sum of the
// group's rows.
#include <arch/host_device.h>

#include <cstdint>

namespace ercn::sm90::affinity {

struct Tile {
  int image, group, column;  // column counts tiles
};

struct Schedule {
  int64_t images;
  int columns;      // tiles in a row of A
  int first_group;  // groups [first_group, first_group + groups) of every image take part
  int groups;
  int step;         // tiles by which a group begins later than the one above: its height in a triangle, else 0
  int64_t workers;  // blocks of threads

  // Tiles of an image in the groups above the g-th one that takes part.
  ERCN_HOST_DEVICE int64_t before(int64_t g) const {
    return g * (columns - static_cast<int64_t>(step) * first_group) - step * (g * (g - 1) / 2);
  }
  ERCN_HOST_DEVICE int64_t tiles() const { return images * before(groups); }

  ERCN_HOST_DEVICE int first_column(int group) const { return step * group; }

  ERCN_HOST_DEVICE Tile tile(int64_t position) const {
    const int64_t image = position / before(groups), rest = position % before(groups);
    int low = 0, high = groups;  // before(low) <= rest < before(high)
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (before(middle) <= rest ? low : high) = middle;
    }
    const int group = first_group + low;
    return {static_cast<int>(image), group, first_column(group) + static_cast<int>(rest - before(low))};
  }

  // Of `left` tiles of the sequence, those that are in the group of the first one, `at`.
  ERCN_HOST_DEVICE int segment(const Tile& at, int left) const {
    const int in_group = columns - at.column;
    return left < in_group ? left : in_group;
  }

  // The first tile of the group after that of `at`.
  ERCN_HOST_DEVICE Tile next_group(const Tile& at) const {
    const bool last = at.group + 1 == first_group + groups;
    const int group = last ? first_group : at.group + 1;
    return {last ? at.image + 1 : at.image, group, first_column(group)};
  }

  // Positions [begin(w), begin(w + 1)) are worker w's.
  ERCN_HOST_DEVICE int64_t begin(int64_t worker) const { return worker * tiles() / workers; }
  ERCN_HOST_DEVICE int64_t worker(int64_t position) const { return ((position + 1) * workers - 1) / tiles(); }

  // Segments begin where a worker or a group does, so worker + group grows from each to the next: it is the slot of the
  // segment's partial sum. A group's partial sums are at slots [first_slot, last_slot], without gaps.
  ERCN_HOST_DEVICE int64_t ordinal(int64_t image, int group) const { return image * groups + group - first_group; }
  ERCN_HOST_DEVICE int64_t slots() const { return workers + images * groups - 1; }
  ERCN_HOST_DEVICE int64_t first_slot(int64_t image, int group) const {
    const int64_t first = image * before(groups) + before(group - first_group);
    return worker(first) + ordinal(image, group);
  }
  ERCN_HOST_DEVICE int64_t last_slot(int64_t image, int group) const {
    const int64_t last = image * before(groups) + before(group - first_group + 1) - 1;
    return worker(last) + ordinal(image, group);
  }
};

// Mirrored sums of a band of groups are [groups, images, channels, width] in fp32, for the pixels beyond its first
// group. A group writes those of the pixels beyond itself.
ERCN_HOST_DEVICE int64_t mirrored_width(int64_t padded_pixels, int group_rows, int first_group) {
  const int64_t width = padded_pixels - (first_group + INT64_C(1)) * group_rows;
  return width > 0 ? width : 0;
}

// Where those of a group for a pixel and those after it lie.
ERCN_HOST_DEVICE int64_t mirrored_offset(
    const Schedule& s, int64_t width, int group_rows, int channels, int group, int64_t image, int channel,
    int64_t pixel) {
  const int64_t map = ((group - s.first_group) * s.images + image) * channels + channel;
  return map * width + pixel - (s.first_group + INT64_C(1)) * group_rows;
}

// As many groups from first_group on as `bytes` of mirrored sums allow, at least one. maps: images · channels.
ERCN_HOST_DEVICE int groups_in_band(
    int64_t bytes, int64_t maps, int64_t padded_pixels, int group_rows, int first_group) {
  const int left = static_cast<int>((padded_pixels + group_rows - 1) / group_rows) - first_group;
  const int64_t each = 4 * maps * mirrored_width(padded_pixels, group_rows, first_group);
  const int64_t fit = each == 0 ? left : bytes / each;
  return static_cast<int>(fit < 1 ? 1 : fit < left ? fit : left);
}

}  // namespace ercn::sm90::affinity
