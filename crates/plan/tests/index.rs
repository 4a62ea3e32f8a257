//! An index names each tensor once and stays in its folder, and must agree with the files it names.

// A failed expectation is the test's own report, in helpers too.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use tensorhaul_plan::dtype::Dtype;
use tensorhaul_plan::header::{Header, NewTensor, encode};
use tensorhaul_plan::index::{INDEX_LEN_BYTES_MAX, Index, IndexError, check_file_name};

#[test]
fn entries_keep_the_order_of_the_map_and_files_are_sorted() {
    let index = parse(r#"{"weight_map":{"z":"b.st","y":"a.st","x":"b.st","":"c.st","\u0077":"a.st"}}"#);
    assert_eq!(index.files(), ["a.st", "b.st", "c.st"]);
    assert_eq!(index.entries().collect::<Vec<_>>(), [("z", 1), ("y", 0), ("x", 1), ("", 2), ("w", 0)]);
    assert_eq!(index.entries().len(), 5);
    assert_eq!(index.file_index("x"), Some(1));
    assert_eq!(index.file_index("v"), None);
    assert_eq!(index.total_size(), None);
}

#[test]
fn an_empty_weight_map_names_no_file() {
    let index = parse(r#"{"weight_map":{}}"#);
    assert!(index.files().is_empty() && index.entries().len() == 0);
    assert_eq!(index.check_against(&[]), Ok(()));
}

#[test]
fn unknown_keys_and_metadata_are_passed_over() {
    let deep = format!("{}{}", "[".repeat(100), "]".repeat(100));
    let index = parse(&format!(
        "\r\n {{\"weight_map\":{{\"a\":\"1.st\"}},\"x\":{deep},\"metadata\":{{\"y\":{deep},\"total_size\":7,\
         \"total_parameters\":3.5}},\"z\":null}} "
    ));
    assert_eq!(index.total_size(), Some(7));
}

#[test]
fn total_size_is_read_where_it_is_a_whole_number_and_ignored_elsewhere() {
    let total_size =
        |metadata: &str| parse(&format!(r#"{{"metadata":{metadata},"weight_map":{{}}}}"#)).total_size();
    assert_eq!(total_size(r#"{"total_size":18446744073709551615}"#), Some(u64::MAX));
    assert_eq!(total_size(r#"{"total_size":26953662464.0}"#), Some(26_953_662_464));
    assert_eq!(total_size(r#"{"total_size":1e3}"#), Some(1000));
    assert_eq!(total_size(r#"{"total_size":1,"total_size":2}"#), Some(2));
    for absent in
        ["-1", "0.5", "-0.5", "1e300", "18446744073709551616", "\"12\"", "null", "true", "[1]", "{}"]
    {
        assert_eq!(total_size(&format!(r#"{{"total_size":{absent}}}"#)), None, "{absent}");
    }
    assert_eq!(total_size("null"), None);
    assert_eq!(total_size("{}"), None);
}

#[test]
fn what_is_no_index_gets_an_error_that_says_where() {
    for (json, text) in [
        ("", "EOF while parsing a value, at byte 0 of the index"),
        ("[]", "invalid type: sequence, expected an index with a weight_map, at byte 0 of the index"),
        ("{}", "missing field `weight_map`, at byte 1 of the index"),
        (r#"{"metadata":{}}"#, "missing field `weight_map`, at byte 14 of the index"),
        (
            r#"{"weight_map":null}"#,
            "invalid type: null, expected a map from tensor to file name, at byte 17 of the index",
        ),
        (
            r#"{"weight_map":["a"]}"#,
            "invalid type: sequence, expected a map from tensor to file name, at byte 13 of the index",
        ),
        (
            r#"{"weight_map":{"a":1}}"#,
            "invalid type: integer `1`, expected a file name, at byte 19 of the index",
        ),
        (
            r#"{"weight_map":{"a":["b"]}}"#,
            "invalid type: sequence, expected a file name, at byte 18 of the index",
        ),
        (r#"{"weight_map":{},"weight_map":{}}"#, "duplicate field `weight_map`, at byte 28 of the index"),
        (
            r#"{"metadata":{},"weight_map":{},"metadata":{}}"#,
            "duplicate field `metadata`, at byte 40 of the index",
        ),
        (
            r#"{"metadata":"x","weight_map":{}}"#,
            "invalid type: string \"x\", expected a map of metadata, at byte 14 of the index",
        ),
        (r#"{"weight_map":{}} x"#, "trailing characters, at byte 18 of the index"),
        ("\u{feff}{\"weight_map\":{}}", "expected value, at byte 0 of the index"),
        ("{\n \"weight_map\":\n {\"a\":\"b\",}}", "trailing comma, at byte 27 of the index"),
    ] {
        let error = Index::parse(json.as_bytes()).unwrap_err();
        assert_eq!(error.to_string(), text, "{json}");
        assert!(error.bytes().is_some() && error.tensor().is_none() && error.file().is_none());
    }
    let error = Index::parse(b"{\"weight_map\":{\"\xff\":\"a\"}}").unwrap_err();
    assert_eq!(error.to_string(), "the index isn't UTF-8 at byte 16");
}

#[test]
fn an_index_beyond_the_maximum_is_refused_unread() {
    let len_bytes = INDEX_LEN_BYTES_MAX + 1;
    assert_eq!(Index::parse(&vec![b' '; len_bytes as usize]).unwrap_err(), IndexError::TooLong { len_bytes });
}

#[test]
fn a_depth_bomb_is_refused_without_a_stack_overflow() {
    for before in ["", "{\"x\":", "{\"metadata\":", "{\"metadata\":{\"x\":", "{\"weight_map\":{\"x\":"] {
        for open in ["[", "{\"a\":"] {
            assert!(Index::parse(format!("{before}{}", open.repeat(100_000)).as_bytes()).is_err());
        }
    }
}

#[test]
fn a_tensor_listed_twice_is_an_error_even_for_the_same_file() {
    for json in [
        r#"{"weight_map":{"a":"1.st","b":"1.st","a":"1.st"}}"#,
        r#"{"weight_map":{"a":"1.st","\u0061":"2.st"}}"#,
    ] {
        let error = Index::parse(json.as_bytes()).unwrap_err();
        assert_eq!(error.to_string(), "tensor \"a\": the weight map lists it twice");
        assert_eq!(error.tensor(), Some("a"));
    }
}

#[test]
fn a_file_name_that_could_leave_the_folder_is_an_error() {
    for (name, problem) in [
        ("", "is empty"),
        (".", "is a folder"),
        ("..", "is a folder"),
        ("../model.safetensors", "holds a path separator"),
        ("a/../../b", "holds a path separator"),
        ("sub/model.safetensors", "holds a path separator"),
        ("./model.safetensors", "holds a path separator"),
        ("/etc/passwd", "holds a path separator"),
        ("model.safetensors/", "holds a path separator"),
        ("..\\model.safetensors", "holds a path separator"),
        ("\\\\server\\share", "holds a path separator"),
        ("C:model.safetensors", "holds a colon, which names a drive or a stream"),
        ("model.safetensors:stream", "holds a colon, which names a drive or a stream"),
        ("model\0.safetensors", "holds a NUL"),
    ] {
        let error = check_file_name(name).unwrap_err();
        assert_eq!(error, IndexError::FileName { tensor: None, file: name.to_owned(), problem });
        let map = BTreeMap::from([("a", "fine.st"), ("b", name)]);
        let json = serde_json::json!({ "weight_map": map }).to_string();
        let error = Index::parse(json.as_bytes()).unwrap_err();
        assert_eq!((error.tensor(), error.file()), (Some("b"), Some(name)));
        assert_eq!(
            error.to_string(),
            format!("tensor \"b\": the file name {name:?} {problem}; the files must lie beside the index")
        );
    }
    for name in [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "a..b",
        "...",
        "..a",
        " ",
        "\u{6a21}\u{578b}",
        "~",
        "-rf",
    ] {
        assert_eq!(check_file_name(name), Ok(()), "{name}");
    }
}

#[test]
fn files_that_agree_with_the_map_pass() {
    let index = parse(r#"{"weight_map":{"a":"1.st","b":"2.st","c":"1.st"}}"#);
    assert_eq!(index.check_against(&[header(&["a", "c"]), header(&["b"])]), Ok(()));
}

#[test]
fn a_tensor_that_only_its_file_lists_is_part_of_the_checkpoint() {
    let index = parse(r#"{"weight_map":{"a":"1.st","b":"2.st"}}"#);
    assert_eq!(index.check_against(&[header(&["a", "extra"]), header(&["b", "other"])]), Ok(()));
}

#[test]
fn a_listed_tensor_that_no_file_has_is_missing() {
    let index = parse(r#"{"weight_map":{"a":"1.st","b":"2.st","c":"2.st"}}"#);
    let error = index.check_against(&[header(&["a"]), header(&["b"])]).unwrap_err();
    assert_eq!(error.to_string(), "tensor \"c\": listed for \"2.st\", but no file has it");
    assert_eq!((error.tensor(), error.file()), (Some("c"), Some("2.st")));
}

#[test]
fn a_tensor_in_another_file_than_listed_is_an_error() {
    let index = parse(r#"{"weight_map":{"a":"1.st","b":"2.st"}}"#);
    let error = index.check_against(&[header(&["a", "b"]), header(&[])]).unwrap_err();
    assert_eq!(error.to_string(), "tensor \"b\": listed for \"2.st\", but it is in \"1.st\"");
    assert_eq!((error.tensor(), error.file()), (Some("b"), Some("2.st")));
}

#[test]
fn a_tensor_in_two_files_is_an_error_whether_listed_or_not() {
    let index = parse(r#"{"weight_map":{"a":"1.st","b":"2.st"}}"#);
    for headers in [
        [header(&["a"]), header(&["b", "a"])],
        [header(&["a", "x"]), header(&["b", "x"])],
        [header(&["b", "a"]), header(&["b"])],
    ] {
        let error = index.check_against(&headers).unwrap_err();
        let tensor = error.tensor().unwrap();
        assert_eq!(error.to_string(), format!("tensor \"{tensor}\": it is in both \"1.st\" and \"2.st\""));
        assert_eq!(error.file(), Some("1.st"));
    }
}

#[test]
fn a_hundred_thousand_entries_are_checked_in_one_pass() {
    let names: Vec<String> = (0..100_000).map(|index| format!("layers.{index}.weight")).collect();
    let map: BTreeMap<&str, String> =
        names.iter().enumerate().map(|(index, name)| (&**name, format!("{}.st", index % 4))).collect();
    let index = parse(&serde_json::json!({ "weight_map": map }).to_string());
    let headers: Vec<Header> = (0..4)
        .map(|file| header(&names.iter().skip(file).step_by(4).map(|name| &**name).collect::<Vec<_>>()))
        .collect();
    assert_eq!(index.entries().len(), names.len());
    assert_eq!(index.check_against(&headers), Ok(()));
}

fn parse(json: &str) -> Index {
    Index::parse(json.as_bytes()).unwrap()
}

/// A header of scalars with these names.
fn header(names: &[&str]) -> Header {
    let tensors: Vec<NewTensor<'_>> =
        names.iter().map(|name| NewTensor { name, dtype: Dtype::U8, shape: &[] }).collect();
    let bytes = encode(&tensors, &BTreeMap::new(), 1).unwrap();
    Header::parse(&bytes[8..], bytes.len() as u64 + names.len() as u64).unwrap()
}
