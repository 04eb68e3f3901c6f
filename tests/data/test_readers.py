import pytest
from _pictures import write_csv, write_davis_tree, write_eyepacs_tree

from ercn.data import DataError
from ercn.data.sets.davis import read_davis
from ercn.data.sets.eyepacs import read_eyepacs


def eyepacs(folder, rows, header="image,level", name="trainLabels.csv", **options):
    write_csv(folder / name, header, rows, **options)
    return str(folder)


def fault(call, *arguments):
    with pytest.raises(DataError) as raised:
        call(*arguments)
    return str(raised.value)


def test_eyepacs_tree_as_published(tmp_path):
    write_eyepacs_tree(tmp_path / "e", patients=6, test=True)
    entries = read_eyepacs(str(tmp_path / "e")).entries
    assert [e.split for e in entries].count("train") == 12
    assert {e.split for e in entries} == {"train", "val", "test"}
    assert all(e.source.is_file() and e.id == f"{e.patient}_{e.id.split('_')[1]}" for e in entries)
    first = entries[0]
    assert (first.id, first.patient, first.source) == ("10_left", "10", tmp_path / "e" / "train" / "10_left.jpeg")


def test_eyepacs_without_test_pictures_leaves_the_split_open(tmp_path):
    write_eyepacs_tree(tmp_path / "e", patients=5)
    write_csv(tmp_path / "e" / "retinopathy_solution.csv", "image,level,Usage", [("1_left", 0, "Private")])
    entries = read_eyepacs(str(tmp_path / "e")).entries
    assert len(entries) == 10 and {e.split for e in entries} == {None}


def test_eyepacs_pictures_beside_the_csv(tmp_path):
    root = eyepacs(tmp_path, [("1_left", 0), ("1_right", 4)])
    (tmp_path / "1_left.jpeg").touch()
    assert [e.source.name for e in read_eyepacs(root).entries] == ["1_left.jpeg", "1_right.jpeg"]
    assert [e.source.exists() for e in read_eyepacs(root).entries] == [True, False]


@pytest.mark.parametrize(
    "options", [{}, {"bom": True}, {"newline": "\r\n"}, {"newline": "\r"}, {"bom": True, "newline": "\r\n"}]
)
def test_line_ends_marks_blanks_and_extensions(tmp_path, options):
    rows = [("007_left", " 2"), ("", ""), (" 007_right.jpeg", "0 ")]
    entries = read_eyepacs(eyepacs(tmp_path, rows, header=" image , level", **options)).entries
    assert [(e.id, e.patient, e.grade) for e in entries] == [("007_left", "007", 2), ("007_right", "007", 0)]


def test_quoted_values_and_further_columns(tmp_path):
    root = eyepacs(tmp_path, [('"1_left"', '"3"', "x", ""), ("2_left", 1, "", "")], header="image,level,note,")
    assert [e.grade for e in read_eyepacs(root).entries] == [3, 1]


@pytest.mark.parametrize("value", ["2.0", "5", "-1", "severe", "", "NA", "nan", "²", "=1+1"])
def test_a_label_that_is_no_grade_is_named(tmp_path, value):
    message = fault(read_eyepacs, eyepacs(tmp_path, [("1_left", 0), ("2_left", value)]))
    assert "trainLabels.csv" in message and "row 3" in message
    assert f"column 'level': {value!r} is not one of 0, 1, 2, 3, 4" in message


@pytest.mark.parametrize("value", ["10", "10_middle", "_left", "left", "10_Left"])
def test_a_name_without_patient_and_eye_is_named(tmp_path, value):
    message = fault(read_eyepacs, eyepacs(tmp_path, [(value, 0)]))
    assert f"row 2: column 'image': {value!r} is not <patient>_left or <patient>_right" in message


@pytest.mark.parametrize("value", ["", "../1_left", "a/1_left", "C:\\1_left", ".1_left"])
def test_a_name_that_is_no_file_name_is_named(tmp_path, value):
    assert f"{value!r} is not a picture's name" in fault(read_eyepacs, eyepacs(tmp_path, [(value, 0)]))


def test_duplicate_ids_are_named_with_both_rows(tmp_path):
    message = fault(read_eyepacs, eyepacs(tmp_path, [("1_left", 0), ("2_left", 0), ("1_left.jpeg", 0)]))
    assert "row 4: column 'image': '1_left' again; first in row 2" in message


def test_ids_that_differ_in_case_only_are_duplicates(tmp_path):
    message = fault(read_eyepacs, eyepacs(tmp_path, [("a_left", 0), ("A_left", 0)]))
    assert "row 3: column 'image': 'A_left' again; first in row 2" in message


def test_ids_with_leading_zeros_are_different_ids(tmp_path):
    entries = read_eyepacs(eyepacs(tmp_path, [("01_left", 0), ("1_left", 1)])).entries
    assert [e.patient for e in entries] == ["01", "1"]


def test_all_faults_are_reported_at_once(tmp_path):
    rows = [("1_left", "2.0"), ("1_left", 0), ("2_middle", 7), ("3_left",)]
    message = fault(read_eyepacs, eyepacs(tmp_path, rows))
    assert "5 fault(s)" in message
    for part in ("row 2", "row 3", "row 4: column 'image'", "row 4: column 'level'", "row 5: 1 values for 2 columns"):
        assert part in message
    message = fault(read_eyepacs, eyepacs(tmp_path, [(f"{i}_left", "x") for i in range(40)]))
    assert "40 fault(s)" in message and "row 11" in message and "row 12" not in message and "and 30 more" in message


@pytest.mark.parametrize(
    ("header", "found"),
    [("image,grade", "'image', 'grade'"), ("Image,level", "'Image', 'level'"), ("image;level", "'image;level'")],
)
def test_a_wrong_column_is_named_with_what_was_found(tmp_path, header, found):
    message = fault(read_eyepacs, eyepacs(tmp_path, [("1_left", 0)], header=header))
    assert "trainLabels.csv: needs one column" in message and found in message


def test_a_column_that_is_there_twice_is_an_error(tmp_path):
    assert "needs one column 'level'" in fault(
        read_eyepacs, eyepacs(tmp_path, [("1_left", 0, 1)], header="image,level,level")
    )


def test_files_that_are_no_csv(tmp_path):
    assert "no such folder" in fault(read_eyepacs, str(tmp_path / "nowhere"))
    assert "root must be the folder" in fault(read_eyepacs, "")
    assert "trainLabels.csv: no such file" in fault(read_eyepacs, str(tmp_path))
    path = tmp_path / "trainLabels.csv"
    for content, part in [
        (b"", "found the columns nothing"),
        (b"image,level\n", "no rows"),
        ("image,level\n1_left,0\n".encode("utf-16"), "not UTF-8"),
        (b"image,level\n1_left,\0\n", "NUL"),
        (b'image,level\n"1_left' + b"x" * 200_000, "field larger"),
    ]:
        path.write_bytes(content)
        assert part in fault(read_eyepacs, str(tmp_path))


def test_an_unknown_usage_is_named(tmp_path):
    eyepacs(tmp_path, [("1_left", 0)])
    eyepacs(tmp_path, [("2_left", 0, "Secret")], header="image,level,Usage", name="retinopathy_solution.csv")
    message = fault(read_eyepacs, str(tmp_path))
    assert "retinopathy_solution.csv" in message and "'Secret' is not one of Public, Private" in message


def test_davis_tree_as_published_with_both_label_columns(tmp_path):
    write_davis_tree(tmp_path / "d", patients=4)
    one = read_davis(str(tmp_path / "d"), "one_figure").entries
    both = read_davis(str(tmp_path / "d"), "concatenated").entries
    assert [e.id for e in one] == [e.id for e in both] and len(one) == 12
    assert [e.grade for e in one] != [e.grade for e in both]
    assert (one[0].id, one[0].patient, one[0].grade, one[0].split) == ("001_1_L", "001", 1, None)
    assert all(e.source.is_file() for e in one)


def test_davis_labels_names_and_folder(tmp_path):
    header = "Image,Davis_grading_of_concatenated_figures,Davis_grading_of_one_figure"
    write_csv(tmp_path / "list.csv", header, [("1_2_L", "ndr", "pdr"), ("a_b_3_R.jpg", "x", "ppdr")])
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1_2_L.JPG").touch()
    entries = read_davis(str(tmp_path), "one_figure").entries
    assert [(e.patient, e.grade, e.source.exists()) for e in entries] == [("1", 3, True), ("a_b", 2, False)]
    assert "row 3: column 'Davis_grading_of_concatenated_figures': 'x' is not one of ndr, sdr, ppdr, pdr" in fault(
        read_davis, str(tmp_path), "concatenated"
    )
    assert "label must be 'one_figure' or 'concatenated'" in fault(read_davis, str(tmp_path), "level")
    write_csv(tmp_path / "list.csv", header, [("12_L.jpg", "ndr", "ndr")])
    assert "'12_L' is not <patient>_<n>_<L or R>" in fault(read_davis, str(tmp_path), "one_figure")
