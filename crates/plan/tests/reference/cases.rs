//! Files by name, each with the verdict both readers must give and the exact error that ours must.
//!
//! A file that once was read wrongly stays here as a case.

use super::oracle::Difference::{self, NameTwice};
use Expected::{Accepted, Differs, Refused};

/// One file and what becomes of it.
pub(crate) struct Case {
    /// A sentence.
    pub(crate) name: &'static str,
    /// Builds the whole file.
    pub(crate) file: fn() -> Vec<u8>,
    /// The verdict.
    pub(crate) expected: Expected,
}

/// The verdict on a [`Case`].
#[derive(Debug)]
pub(crate) enum Expected {
    /// Both readers accept it.
    Accepted,
    /// Both readers refuse it, ours with this text.
    Refused(&'static str),
    /// Only we refuse it, for a listed reason, with this text.
    Differs(Difference, &'static str),
}

/// Builds a file with a true length prefix and this many bytes of data.
pub(crate) fn file(json: &[u8], data_len_bytes: usize) -> Vec<u8> {
    let prefix = (json.len() as u64).to_le_bytes();
    [&prefix[..], json, &vec![0; data_len_bytes]].concat()
}

/// A header of one entry.
fn entry(name: &str, entry: &str) -> Vec<u8> {
    format!("{{\"{name}\":{entry}}}").into_bytes()
}

/// An entry with an unknown field of lists in lists.
fn nested(depth: usize) -> String {
    let (open, close) = ("[".repeat(depth), "]".repeat(depth));
    format!(r#"{{"dtype":"F32","shape":[2],"data_offsets":[0,8],"a":{open}{close}}}"#)
}

const fn case(name: &'static str, file: fn() -> Vec<u8>, expected: Expected) -> Case {
    Case { name, file, expected }
}

/// The table.
pub(crate) const CASES: &[Case] = &[
    case(
        "an empty file is refused",
        || b"".to_vec(),
        Refused("the file has 0 bytes, a safetensors file has at least 8"),
    ),
    case(
        "seven bytes are no prefix",
        || b"\x00\x00\x00\x00\x00\x00\x00".to_vec(),
        Refused("the file has 7 bytes, a safetensors file has at least 8"),
    ),
    case(
        "a prefix of zero and nothing else is refused",
        || b"\x00\x00\x00\x00\x00\x00\x00\x00".to_vec(),
        Refused("EOF while parsing a value, at byte 8 of the file"),
    ),
    case(
        "a prefix of zero before data is refused",
        || b"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00".to_vec(),
        Refused("EOF while parsing a value, at byte 8 of the file"),
    ),
    case("the smallest file is an empty map", || b"\x02\x00\x00\x00\x00\x00\x00\x00{}".to_vec(), Accepted),
    case(
        "a header that ends one byte beyond the file is refused",
        || b"\x03\x00\x00\x00\x00\x00\x00\x00{}".to_vec(),
        Refused("the header ends at byte 11 of the file, which has 10"),
    ),
    case(
        "a header that ends before its brace is refused",
        || b"\x01\x00\x00\x00\x00\x00\x00\x00{}".to_vec(),
        Refused("EOF while parsing an object, at byte 8 of the file"),
    ),
    case(
        "a header at the maximum in a short file is refused",
        || b"\x00\xe1\xf5\x05\x00\x00\x00\x00{}".to_vec(),
        Refused("the header ends at byte 100000008 of the file, which has 10"),
    ),
    case(
        "a header one byte beyond the maximum is refused",
        || b"\x01\xe1\xf5\x05\x00\x00\x00\x00{}".to_vec(),
        Refused(
            "the first 8 bytes announce a header of 100000001 bytes, the maximum is 100000000; is this a safetensors file?",
        ),
    ),
    case(
        "a header of 2^63 bytes is refused",
        || b"\x00\x00\x00\x00\x00\x00\x00\x80{}".to_vec(),
        Refused(
            "the first 8 bytes announce a header of 9223372036854775808 bytes, the maximum is 100000000; is this a safetensors file?",
        ),
    ),
    case(
        "a header of 2^64 - 8 bytes is refused",
        || b"\xf8\xff\xff\xff\xff\xff\xff\xff{}".to_vec(),
        Refused(
            "the first 8 bytes announce a header of 18446744073709551608 bytes, the maximum is 100000000; is this a safetensors file?",
        ),
    ),
    case(
        "a header of 2^64 - 1 bytes is refused",
        || b"\xff\xff\xff\xff\xff\xff\xff\xff{}".to_vec(),
        Refused(
            "the first 8 bytes announce a header of 18446744073709551615 bytes, the maximum is 100000000; is this a safetensors file?",
        ),
    ),
    case(
        "a big-endian prefix is refused",
        || b"\x00\x00\x00\x00\x00\x00\x00\x02{}".to_vec(),
        Refused(
            "the first 8 bytes announce a header of 144115188075855872 bytes, the maximum is 100000000; is this a safetensors file?",
        ),
    ),
    case(
        "a zip archive is refused",
        || b"PK\x03\x04\x14\x00\x00\x00\x08\x00abc".to_vec(),
        Refused(
            "the first 8 bytes announce a header of 85966670672 bytes, the maximum is 100000000; is this a safetensors file?",
        ),
    ),
    case(
        "a pickle is refused",
        || b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.".to_vec(),
        Refused(
            "the first 8 bytes announce a header of 5088219219985302144 bytes, the maximum is 100000000; is this a safetensors file?",
        ),
    ),
    case(
        "a GGUF file is refused",
        || b"GGUF\x03\x00\x00\x00\x00\x00\x00\x00".to_vec(),
        Refused(
            "the first 8 bytes announce a header of 14064895815 bytes, the maximum is 100000000; is this a safetensors file?",
        ),
    ),
    case(
        "a text file is refused",
        || b"version https://git-lfs.github.com/spec/v1\n".to_vec(),
        Refused(
            "the first 8 bytes announce a header of 2336927755350992246 bytes, the maximum is 100000000; is this a safetensors file?",
        ),
    ),
    case("an empty map holds no tensors", || file(b"{}", 0), Accepted),
    case(
        "an empty map before data is refused",
        || file(b"{}", 1),
        Refused("the data ends at byte 10 of the file, which has 11"),
    ),
    case(
        "an empty header text is refused",
        || file(b"", 0),
        Refused("EOF while parsing a value, at byte 8 of the file"),
    ),
    case(
        "white space alone is refused",
        || file(b"   ", 0),
        Refused("EOF while parsing a value, at byte 10 of the file"),
    ),
    case(
        "null is refused",
        || file(b"null", 0),
        Refused("invalid type: null, expected a map of tensors, at byte 11 of the file"),
    ),
    case(
        "an empty list is refused",
        || file(b"[]", 0),
        Refused("invalid type: sequence, expected a map of tensors, at byte 8 of the file"),
    ),
    case(
        "a list of metadata and tensors is refused",
        || file(b"[null,{}]", 0),
        Refused("invalid type: sequence, expected a map of tensors, at byte 8 of the file"),
    ),
    case(
        "a number is refused",
        || file(b"0", 0),
        Refused("invalid type: integer `0`, expected a map of tensors, at byte 8 of the file"),
    ),
    case(
        "a string is refused",
        || file(br#""{}""#, 0),
        Refused(r#"invalid type: string "{}", expected a map of tensors, at byte 11 of the file"#),
    ),
    case(
        "trailing spaces are accepted",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}      "#, 8),
        Accepted,
    ),
    case(
        "leading spaces are accepted",
        || file(br#"   {"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Accepted,
    ),
    case(
        "tabs and newlines around tokens are accepted",
        || {
            file(b"\r\n\t{ \"x\" :\n{ \"dtype\" : \"F32\" ,\t\"shape\" : [ 2 ] ,\r\n\"data_offsets\" : [ 0 , 8 ] } }\n", 8)
        },
        Accepted,
    ),
    case(
        "a trailing NUL is refused",
        || file(b"{}\x00", 0),
        Refused("trailing characters, at byte 10 of the file"),
    ),
    case(
        "a vertical tab is no white space",
        || file(b"{\x0b}", 0),
        Refused("key must be a string, at byte 9 of the file"),
    ),
    case(
        "a form feed is no white space",
        || file(b"{}\x0c", 0),
        Refused("trailing characters, at byte 10 of the file"),
    ),
    case(
        "a no-break space is no white space",
        || file(b"{}\xc2\xa0", 0),
        Refused("trailing characters, at byte 10 of the file"),
    ),
    case(
        "a byte order mark is refused",
        || file(b"\xef\xbb\xbf{}", 0),
        Refused("expected value, at byte 8 of the file"),
    ),
    case(
        "a second map is refused",
        || file(b"{}{}", 0),
        Refused("trailing characters, at byte 10 of the file"),
    ),
    case(
        "a trailing comma is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},}"#, 8),
        Refused("trailing comma, at byte 62 of the file"),
    ),
    case(
        "a leading comma is refused",
        || file(br#"{,"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused("key must be a string, at byte 9 of the file"),
    ),
    case(
        "a missing comma is refused",
        || {
            file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]} "y":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#, 16)
        },
        Refused("expected `,` or `}`, at byte 62 of the file"),
    ),
    case(
        "a missing colon is refused",
        || file(br#"{"x" {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": expected `:`, at byte 13 of the file"#),
    ),
    case(
        "an unclosed map is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#, 8),
        Refused("EOF while parsing an object, at byte 60 of the file"),
    ),
    case(
        "an unclosed entry is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]"#, 8),
        Refused(r#"tensor "x": EOF while parsing an object, at byte 59 of the file"#),
    ),
    case(
        "an unclosed string is refused",
        || file(br#"{"x"#, 0),
        Refused("EOF while parsing a string, at byte 10 of the file"),
    ),
    case(
        "a comment is refused",
        || file(b"{/* none */}", 0),
        Refused("key must be a string, at byte 9 of the file"),
    ),
    case(
        "single quotes are refused",
        || file(br#"{'x':{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused("key must be a string, at byte 9 of the file"),
    ),
    case(
        "a bare key is refused",
        || file(br#"{x:{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused("key must be a string, at byte 9 of the file"),
    ),
    case(
        "a number as key is refused",
        || file(br#"{1:{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused("key must be a string, at byte 9 of the file"),
    ),
    case(
        "a null as key is refused",
        || file(br#"{null:{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused("key must be a string, at byte 9 of the file"),
    ),
    case(
        "NaN in an unknown field is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"n":NaN}}"#, 8),
        Refused(r#"tensor "x": expected value, at byte 65 of the file"#),
    ),
    case(
        "an error on the third line is placed by byte",
        || file(b"{\n\"x\":\n{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},}", 8),
        Refused("trailing comma, at byte 64 of the file"),
    ),
    case(
        "UTF-16 text is refused",
        || file(b"{\x00}\x00", 0),
        Refused("key must be a string, at byte 9 of the file"),
    ),
    case(
        "a byte that is no UTF-8 in a name is refused",
        || file(b"{\"\xff\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8),
        Refused("the header isn't UTF-8 at byte 10 of the file"),
    ),
    case(
        "a byte that is no UTF-8 in an unknown field is refused",
        || file(b"{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8],\"n\":\"\xc3\"}}", 8),
        Refused("the header isn't UTF-8 at byte 66 of the file"),
    ),
    case(
        "a byte that is no UTF-8 after the map is refused",
        || file(b"{}\xff", 0),
        Refused("the header isn't UTF-8 at byte 10 of the file"),
    ),
    case(
        "an overlong UTF-8 sequence is refused",
        || file(b"{\"\xc0\xaf\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8),
        Refused("the header isn't UTF-8 at byte 10 of the file"),
    ),
    case(
        "a surrogate in UTF-8 is refused",
        || file(b"{\"\xed\xa0\x80\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8),
        Refused("the header isn't UTF-8 at byte 10 of the file"),
    ),
    case(
        "an empty name is accepted",
        || file(br#"{"":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Accepted,
    ),
    case(
        "a name of spaces is accepted",
        || file(br#"{"  ":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Accepted,
    ),
    case(
        "a name in another script is accepted",
        || {
            file(b"{\"\xe5\xb1\x82.\xe6\x9d\x83\xe9\x87\x8d\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8)
        },
        Accepted,
    ),
    case(
        "a name with an emoji as a surrogate pair is accepted",
        || file(br#"{"\ud83e\udd17":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Accepted,
    ),
    case(
        "a name with escapes is accepted",
        || file(br#"{"a\"b\\c\/d\n\u0041":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Accepted,
    ),
    case(
        "a name with an escaped NUL is accepted",
        || file(br#"{"a\u0000b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Accepted,
    ),
    case(
        "a name with a raw NUL is refused",
        || file(b"{\"a\x00b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8),
        Refused(r#"control character (\u0000-\u001F) found while parsing a string, at byte 11 of the file"#),
    ),
    case(
        "a name with a raw newline is refused",
        || file(b"{\"a\nb\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8),
        Refused(r#"control character (\u0000-\u001F) found while parsing a string, at byte 12 of the file"#),
    ),
    case(
        "a name with a raw DEL is accepted",
        || file(b"{\"a\x7fb\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8),
        Accepted,
    ),
    case(
        "a name with an unknown escape is refused",
        || file(br#"{"\x41":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused("invalid escape, at byte 11 of the file"),
    ),
    case(
        "a name with a short escape is refused",
        || file(br#"{"\u41":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused("invalid escape, at byte 15 of the file"),
    ),
    case(
        "a name with a lone leading surrogate is refused",
        || file(br#"{"\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused("unexpected end of hex escape, at byte 16 of the file"),
    ),
    case(
        "a name with a lone trailing surrogate is refused",
        || file(br#"{"\udc00":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused("lone leading surrogate in hex escape, at byte 15 of the file"),
    ),
    case(
        "a name with swapped surrogates is refused",
        || file(br#"{"\udc00\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused("lone leading surrogate in hex escape, at byte 15 of the file"),
    ),
    case(
        "names that differ in case are two tensors",
        || {
            file(br#"{"X":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"x":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#, 16)
        },
        Accepted,
    ),
    case(
        "names that differ in normalization are two tensors",
        || {
            file(b"{\"\xc3\xa9\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"e\xcc\x81\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16]}}", 16)
        },
        Accepted,
    ),
    case(
        "a name of a million bytes is accepted",
        || file(&entry(&"n".repeat(1_000_000), r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#), 8),
        Accepted,
    ),
    case(
        "a name of a million bytes is shortened in an error",
        || file(&entry(&"n".repeat(1_000_000), r#"{"dtype":"F32","shape":[2],"data_offsets":[0,9]}"#), 9),
        Refused(
            r#"tensor "nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn"... (1000000 bytes): data_offsets span 9 bytes, F32 [2] needs 8"#,
        ),
    ),
    case(
        "a name that is a path is accepted",
        || file(br#"{"../../etc/passwd":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Accepted,
    ),
    case(
        "a name twice with other data is refused",
        || {
            file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"x":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#, 16)
        },
        Refused(r#"tensor "x": listed twice, with data_offsets [0, 8] and [8, 16]"#),
    ),
    case(
        "a name twice around another tensor is refused",
        || {
            file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"y":{"dtype":"F32","shape":[2],"data_offsets":[8,16]},"x":{"dtype":"F32","shape":[2],"data_offsets":[16,24]}}"#, 24)
        },
        Refused(r#"tensor "x": listed twice, with data_offsets [0, 8] and [16, 24]"#),
    ),
    case(
        "a name twice with the same data is refused",
        || {
            file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8)
        },
        Differs(NameTwice, r#"tensor "x": listed twice, with data_offsets [0, 8] and [0, 8]"#),
    ),
    case(
        "a name twice with another dtype is refused",
        || {
            file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"x":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#, 8)
        },
        Differs(NameTwice, r#"tensor "x": listed twice, with data_offsets [0, 8] and [0, 8]"#),
    ),
    case(
        "a name twice of which the last covers the file is refused",
        || {
            file(br#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8)
        },
        Differs(NameTwice, r#"tensor "x": listed twice, with data_offsets [0, 4] and [0, 8]"#),
    ),
    case(
        "a name twice of which the first has impossible offsets is refused",
        || {
            file(br#"{"x":{"dtype":"F32","shape":[9],"data_offsets":[7,3]},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8)
        },
        Differs(NameTwice, r#"tensor "x": listed twice, with data_offsets [0, 8] and [7, 3]"#),
    ),
    case(
        "a name twice with no data is refused",
        || {
            file(br#"{"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#, 0)
        },
        Differs(NameTwice, r#"tensor "x": listed twice, with data_offsets [0, 0] and [0, 0]"#),
    ),
    case(
        "a name twice of which the first is no entry is refused",
        || file(br#"{"x":null,"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused(
            r#"tensor "x": invalid type: null, expected a tensor's dtype, shape and data_offsets, at byte 16 of the file"#,
        ),
    ),
    case(
        "names that collide after unescaping are refused",
        || {
            file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"\u0078":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8)
        },
        Differs(NameTwice, r#"tensor "x": listed twice, with data_offsets [0, 8] and [0, 8]"#),
    ),
    case(
        "an empty name twice is refused",
        || {
            file(br#"{"":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8)
        },
        Differs(NameTwice, r#"tensor "": listed twice, with data_offsets [0, 8] and [0, 8]"#),
    ),
    case(
        "an entry that is null is refused",
        || file(br#"{"x":null}"#, 8),
        Refused(
            r#"tensor "x": invalid type: null, expected a tensor's dtype, shape and data_offsets, at byte 16 of the file"#,
        ),
    ),
    case(
        "an entry that is a string is refused",
        || file(br#"{"x":"F32"}"#, 8),
        Refused(
            r#"tensor "x": invalid type: string "F32", expected a tensor's dtype, shape and data_offsets, at byte 17 of the file"#,
        ),
    ),
    case(
        "an entry that is a number is refused",
        || file(br#"{"x":8}"#, 8),
        Refused(
            r#"tensor "x": invalid type: integer `8`, expected a tensor's dtype, shape and data_offsets, at byte 13 of the file"#,
        ),
    ),
    case(
        "an entry that is true is refused",
        || file(br#"{"x":true}"#, 8),
        Refused(
            r#"tensor "x": invalid type: boolean `true`, expected a tensor's dtype, shape and data_offsets, at byte 16 of the file"#,
        ),
    ),
    case(
        "an empty entry is refused",
        || file(br#"{"x":{}}"#, 0),
        Refused(r#"tensor "x": missing field `dtype`, at byte 14 of the file"#),
    ),
    case(
        "an entry without dtype is refused",
        || file(br#"{"x":{"shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": missing field `dtype`, at byte 46 of the file"#),
    ),
    case(
        "an entry without shape is refused",
        || file(br#"{"x":{"dtype":"F32","data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": missing field `shape`, at byte 48 of the file"#),
    ),
    case(
        "an entry without data_offsets is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2]}}"#, 8),
        Refused(r#"tensor "x": missing field `data_offsets`, at byte 39 of the file"#),
    ),
    case(
        "fields in another order are accepted",
        || file(br#"{"x":{"data_offsets":[0,8],"shape":[2],"dtype":"F32"}}"#, 8),
        Accepted,
    ),
    case(
        "fields with escaped names are accepted",
        || file(br#"{"x":{"\u0064type":"F32","sha\u0070e":[2],"data\u005foffsets":[0,8]}}"#, 8),
        Accepted,
    ),
    case(
        "fields in capitals are refused",
        || file(br#"{"x":{"DTYPE":"F32","SHAPE":[2],"DATA_OFFSETS":[0,8]}}"#, 8),
        Refused(r#"tensor "x": missing field `dtype`, at byte 60 of the file"#),
    ),
    case(
        "fields in camel case are refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"dataOffsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": missing field `data_offsets`, at byte 59 of the file"#),
    ),
    case(
        "dtype twice is refused",
        || file(br#"{"x":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": duplicate field `dtype`, at byte 34 of the file"#),
    ),
    case(
        "shape twice is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": duplicate field `shape`, at byte 46 of the file"#),
    ),
    case(
        "data_offsets twice is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": duplicate field `data_offsets`, at byte 74 of the file"#),
    ),
    case(
        "dtype twice after unescaping is refused",
        || file(br#"{"x":{"dtype":"F32","\u0064type":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": duplicate field `dtype`, at byte 39 of the file"#),
    ),
    case(
        "an unknown field is accepted",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"stride":[1]}}"#, 8),
        Accepted,
    ),
    case(
        "an unknown field twice is accepted",
        || file(br#"{"x":{"a":1,"dtype":"F32","a":2,"shape":[2],"data_offsets":[0,8]}}"#, 8),
        Accepted,
    ),
    case(
        "unknown fields of every kind are accepted",
        || {
            file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"a":null,"b":true,"c":-1,"d":1.5e-7,"e":"\n","f":[[],{}],"g":{"h":{}}}}"#, 8)
        },
        Accepted,
    ),
    case(
        "an unknown field with a number beyond f64 is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"a":1e999}}"#, 8),
        Refused(r#"tensor "x": number out of range, at byte 69 of the file"#),
    ),
    case(
        "an unknown field with an integer beyond u64 is accepted",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"a":99999999999999999999999}}"#, 8),
        Accepted,
    ),
    case(
        "an unknown field with a lone surrogate is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"a":"\ud800"}}"#, 8),
        Refused(r#"tensor "x": unexpected end of hex escape, at byte 72 of the file"#),
    ),
    case(
        "an unknown key with a lone surrogate is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"a":{"\ud800":1}}}"#, 8),
        Refused(r#"tensor "x": unexpected end of hex escape, at byte 73 of the file"#),
    ),
    case(
        "an unknown field with a raw control character is refused",
        || file(b"{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8],\"a\":\"\x01\"}}", 8),
        Refused(
            r#"tensor "x": control character (\u0000-\u001F) found while parsing a string, at byte 66 of the file"#,
        ),
    ),
    case(
        "an unknown field with a leading zero is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"a":01}}"#, 8),
        Refused(r#"tensor "x": invalid number, at byte 66 of the file"#),
    ),
    case(
        "an unknown field with a bare point is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"a":1.}}"#, 8),
        Refused(r#"tensor "x": invalid number, at byte 67 of the file"#),
    ),
    case(
        "an unknown field with a plus sign is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"a":+1}}"#, 8),
        Refused(r#"tensor "x": expected value, at byte 65 of the file"#),
    ),
    case(
        "an unknown field with an unclosed list is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"a":[1}}"#, 8),
        Refused(r#"tensor "x": expected `,` or `]`, at byte 67 of the file"#),
    ),
    case("an unknown field 125 lists deep is accepted", || file(&entry("x", &nested(125)), 8), Accepted),
    case(
        "an unknown field 126 lists deep is refused",
        || file(&entry("x", &nested(126)), 8),
        Refused(r#"tensor "x": recursion limit exceeded, at byte 190 of the file"#),
    ),
    case(
        "an unknown field 100,000 lists deep is refused",
        || file(&entry("x", &nested(100_000)), 8),
        Refused(r#"tensor "x": recursion limit exceeded, at byte 190 of the file"#),
    ),
    case(
        "an entry 100,000 lists deep is refused",
        || file(&[&br#"{"x":"#[..], &b"[".repeat(100_000)].concat(), 0),
        Refused(
            r#"tensor "x": invalid type: sequence, expected the name of a dtype, at byte 14 of the file"#,
        ),
    ),
    case(
        "a header 100,000 maps deep is refused",
        || file(&br#"{"x":"#.repeat(100_000), 0),
        Refused(r#"tensor "x": recursion limit exceeded, at byte 643 of the file"#),
    ),
    case("an entry as an array is accepted", || file(br#"{"x":["F32",[2],[0,8]]}"#, 8), Accepted),
    case(
        "an entry as an array out of order is refused",
        || file(br#"{"x":[[2],"F32",[0,8]]}"#, 8),
        Refused(
            r#"tensor "x": invalid type: sequence, expected the name of a dtype, at byte 14 of the file"#,
        ),
    ),
    case(
        "an entry as an empty array is refused",
        || file(br#"{"x":[]}"#, 0),
        Refused(
            r#"tensor "x": invalid length 0, expected dtype, shape and data_offsets, at byte 14 of the file"#,
        ),
    ),
    case(
        "an entry as an array of one is refused",
        || file(br#"{"x":["F32"]}"#, 8),
        Refused(
            r#"tensor "x": invalid length 1, expected dtype, shape and data_offsets, at byte 19 of the file"#,
        ),
    ),
    case(
        "an entry as an array of two is refused",
        || file(br#"{"x":["F32",[2]]}"#, 8),
        Refused(
            r#"tensor "x": invalid length 2, expected dtype, shape and data_offsets, at byte 23 of the file"#,
        ),
    ),
    case(
        "an entry as an array of four is refused",
        || file(br#"{"x":["F32",[2],[0,8],null]}"#, 8),
        Refused(r#"tensor "x": trailing characters, at byte 30 of the file"#),
    ),
    case(
        "array and map entries mix",
        || file(br#"{"x":["F32",[2],[0,8]],"y":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#, 16),
        Accepted,
    ),
    case(
        "F4 has the width of the reference",
        || file(br#"{"x":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}"#, 1),
        Accepted,
    ),
    case(
        "F6_E2M3 has the width of the reference",
        || file(br#"{"x":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}"#, 3),
        Accepted,
    ),
    case(
        "F6_E3M2 has the width of the reference",
        || file(br#"{"x":{"dtype":"F6_E3M2","shape":[4],"data_offsets":[0,3]}}"#, 3),
        Accepted,
    ),
    case(
        "BOOL has the width of the reference",
        || file(br#"{"x":{"dtype":"BOOL","shape":[1],"data_offsets":[0,1]}}"#, 1),
        Accepted,
    ),
    case(
        "U8 has the width of the reference",
        || file(br#"{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#, 1),
        Accepted,
    ),
    case(
        "I8 has the width of the reference",
        || file(br#"{"x":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}"#, 1),
        Accepted,
    ),
    case(
        "F8_E5M2 has the width of the reference",
        || file(br#"{"x":{"dtype":"F8_E5M2","shape":[1],"data_offsets":[0,1]}}"#, 1),
        Accepted,
    ),
    case(
        "F8_E4M3 has the width of the reference",
        || file(br#"{"x":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}"#, 1),
        Accepted,
    ),
    case(
        "F8_E8M0 has the width of the reference",
        || file(br#"{"x":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}"#, 1),
        Accepted,
    ),
    case(
        "F8_E4M3FNUZ has the width of the reference",
        || file(br#"{"x":{"dtype":"F8_E4M3FNUZ","shape":[1],"data_offsets":[0,1]}}"#, 1),
        Accepted,
    ),
    case(
        "F8_E5M2FNUZ has the width of the reference",
        || file(br#"{"x":{"dtype":"F8_E5M2FNUZ","shape":[1],"data_offsets":[0,1]}}"#, 1),
        Accepted,
    ),
    case(
        "I16 has the width of the reference",
        || file(br#"{"x":{"dtype":"I16","shape":[1],"data_offsets":[0,2]}}"#, 2),
        Accepted,
    ),
    case(
        "U16 has the width of the reference",
        || file(br#"{"x":{"dtype":"U16","shape":[1],"data_offsets":[0,2]}}"#, 2),
        Accepted,
    ),
    case(
        "F16 has the width of the reference",
        || file(br#"{"x":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}"#, 2),
        Accepted,
    ),
    case(
        "BF16 has the width of the reference",
        || file(br#"{"x":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}"#, 2),
        Accepted,
    ),
    case(
        "I32 has the width of the reference",
        || file(br#"{"x":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}"#, 4),
        Accepted,
    ),
    case(
        "U32 has the width of the reference",
        || file(br#"{"x":{"dtype":"U32","shape":[1],"data_offsets":[0,4]}}"#, 4),
        Accepted,
    ),
    case(
        "F32 has the width of the reference",
        || file(br#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 4),
        Accepted,
    ),
    case(
        "C64 has the width of the reference",
        || file(br#"{"x":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}}"#, 8),
        Accepted,
    ),
    case(
        "F64 has the width of the reference",
        || file(br#"{"x":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}"#, 8),
        Accepted,
    ),
    case(
        "I64 has the width of the reference",
        || file(br#"{"x":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#, 8),
        Accepted,
    ),
    case(
        "U64 has the width of the reference",
        || file(br#"{"x":{"dtype":"U64","shape":[1],"data_offsets":[0,8]}}"#, 8),
        Accepted,
    ),
    case(
        "a lower-case dtype is refused",
        || file(br#"{"x":{"dtype":"f32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": dtype "f32" isn't one of the format's 22"#),
    ),
    case(
        "a dtype with a space is refused",
        || file(br#"{"x":{"dtype":"F32 ","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": dtype "F32 " isn't one of the format's 22"#),
    ),
    case(
        "an empty dtype is refused",
        || file(br#"{"x":{"dtype":"","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": dtype "" isn't one of the format's 22"#),
    ),
    case(
        "a torch dtype is refused",
        || file(br#"{"x":{"dtype":"torch.float32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": dtype "torch.float32" isn't one of the format's 22"#),
    ),
    case(
        "a dtype of a later format is refused",
        || file(br#"{"x":{"dtype":"I4","shape":[16],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": dtype "I4" isn't one of the format's 22"#),
    ),
    case(
        "C128 is refused",
        || file(br#"{"x":{"dtype":"C128","shape":[1],"data_offsets":[0,16]}}"#, 16),
        Refused(r#"tensor "x": dtype "C128" isn't one of the format's 22"#),
    ),
    case(
        "a variant name of Rust is refused",
        || file(br#"{"x":{"dtype":"F8E4m3","shape":[8],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": dtype "F8E4m3" isn't one of the format's 22"#),
    ),
    case(
        "a dtype as a number is refused",
        || file(br#"{"x":{"dtype":17,"shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused(
            r#"tensor "x": invalid type: integer `17`, expected the name of a dtype, at byte 23 of the file"#,
        ),
    ),
    case(
        "a dtype as null is refused",
        || file(br#"{"x":{"dtype":null,"shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": invalid type: null, expected the name of a dtype, at byte 25 of the file"#),
    ),
    case(
        "a dtype as an array is refused",
        || file(br#"{"x":{"dtype":["F32"],"shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused(
            r#"tensor "x": invalid type: sequence, expected the name of a dtype, at byte 22 of the file"#,
        ),
    ),
    case(
        "an escaped dtype is accepted",
        || file(br#"{"x":{"dtype":"\u004632","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Accepted,
    ),
    case(
        "a dtype as a map to null is accepted",
        || file(br#"{"x":{"dtype":{"F32":null},"shape":[2],"data_offsets":[0,8]}}"#, 8),
        Accepted,
    ),
    case(
        "a dtype as a map to a map is refused",
        || file(br#"{"x":{"dtype":{"F32":{}},"shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": invalid type: map, expected unit, at byte 28 of the file"#),
    ),
    case(
        "a dtype as a map to a list is refused",
        || file(br#"{"x":{"dtype":{"F32":[]},"shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": invalid type: sequence, expected unit, at byte 28 of the file"#),
    ),
    case(
        "a dtype as a map to a number is refused",
        || file(br#"{"x":{"dtype":{"F32":0},"shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": invalid type: integer `0`, expected unit, at byte 29 of the file"#),
    ),
    case(
        "a dtype as an empty map is refused",
        || file(br#"{"x":{"dtype":{},"shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": invalid length 0, expected the name of a dtype, at byte 23 of the file"#),
    ),
    case(
        "a dtype as a map of two is refused",
        || file(br#"{"x":{"dtype":{"F32":null,"F16":null},"shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": invalid length 2, expected the name of one dtype, at byte 38 of the file"#),
    ),
    case(
        "a dtype as a map of one twice is refused",
        || file(br#"{"x":{"dtype":{"F32":null,"F32":null},"shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": invalid length 2, expected the name of one dtype, at byte 38 of the file"#),
    ),
    case(
        "a dtype as a map of an unknown name is refused",
        || file(br#"{"x":{"dtype":{"F33":null},"shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": dtype "F33" isn't one of the format's 22"#),
    ),
    case(
        "a dtype of a tensor with no data must be known",
        || file(br#"{"x":{"dtype":"F33","shape":[0],"data_offsets":[0,0]}}"#, 0),
        Refused(r#"tensor "x": dtype "F33" isn't one of the format's 22"#),
    ),
    case(
        "a scalar has an empty shape",
        || file(br#"{"x":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}"#, 4),
        Accepted,
    ),
    case(
        "a scalar without data is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[],"data_offsets":[0,0]}}"#, 0),
        Refused(r#"tensor "x": data_offsets span 0 bytes, F32 [] needs 4"#),
    ),
    case(
        "a dim of zero needs no data",
        || file(br#"{"x":{"dtype":"F32","shape":[4,0,8],"data_offsets":[0,0]}}"#, 0),
        Accepted,
    ),
    case(
        "a dim of zero with data is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[4,0,8],"data_offsets":[0,4]}}"#, 4),
        Refused(r#"tensor "x": data_offsets span 4 bytes, F32 [4, 0, 8] needs 0"#),
    ),
    case(
        "dims of one are kept",
        || file(br#"{"x":{"dtype":"F32","shape":[1,1,1,2,1,1],"data_offsets":[0,8]}}"#, 8),
        Accepted,
    ),
    case(
        "a thousand dims are accepted",
        || {
            file(
                &entry(
                    "x",
                    &format!(r#"{{"dtype":"F32","shape":[{}2],"data_offsets":[0,8]}}"#, "1,".repeat(999)),
                ),
                8,
            )
        },
        Accepted,
    ),
    case(
        "a thousand dims are shortened in an error",
        || {
            file(
                &entry(
                    "x",
                    &format!(r#"{{"dtype":"F32","shape":[{}2],"data_offsets":[0,9]}}"#, "1,".repeat(999)),
                ),
                9,
            )
        },
        Refused(
            r#"tensor "x": data_offsets span 9 bytes, F32 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, ... 1000 dims] needs 8"#,
        ),
    ),
    case(
        "a shape as null is refused",
        || file(br#"{"x":{"dtype":"F32","shape":null,"data_offsets":[0,8]}}"#, 8),
        Refused(
            r#"tensor "x": invalid type: null, expected a shape: a list of dims, at byte 39 of the file"#,
        ),
    ),
    case(
        "a shape as a number is refused",
        || file(br#"{"x":{"dtype":"F32","shape":2,"data_offsets":[0,8]}}"#, 8),
        Refused(
            r#"tensor "x": invalid type: integer `2`, expected a shape: a list of dims, at byte 36 of the file"#,
        ),
    ),
    case(
        "a shape as a string is refused",
        || file(br#"{"x":{"dtype":"F32","shape":"2","data_offsets":[0,8]}}"#, 8),
        Refused(
            r#"tensor "x": invalid type: string "2", expected a shape: a list of dims, at byte 38 of the file"#,
        ),
    ),
    case(
        "a shape as a map is refused",
        || file(br#"{"x":{"dtype":"F32","shape":{"0":2},"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": invalid type: map, expected a shape: a list of dims, at byte 35 of the file"#),
    ),
    case(
        "a shape of lists is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[[2]],"data_offsets":[0,8]}}"#, 8),
        Refused(
            r#"tensor "x": invalid type: sequence, expected a whole number below 2^64, at byte 36 of the file"#,
        ),
    ),
    case(
        "a negative dim is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}"#, 8),
        Refused(
            r#"tensor "x": invalid type: integer `-2`, expected a whole number below 2^64, at byte 38 of the file"#,
        ),
    ),
    case(
        "a dim of minus zero is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}"#, 0),
        Refused(
            r#"tensor "x": invalid type: floating point `-0.0`, expected a whole number below 2^64, at byte 38 of the file"#,
        ),
    ),
    case(
        "a dim as a float is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}"#, 8),
        Refused(
            r#"tensor "x": invalid type: floating point `2.0`, expected a whole number below 2^64, at byte 39 of the file"#,
        ),
    ),
    case(
        "a dim with an exponent is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}}"#, 8),
        Refused(
            r#"tensor "x": invalid type: floating point `2.0`, expected a whole number below 2^64, at byte 39 of the file"#,
        ),
    ),
    case(
        "a dim as a string is refused",
        || file(br#"{"x":{"dtype":"F32","shape":["2"],"data_offsets":[0,8]}}"#, 8),
        Refused(
            r#"tensor "x": invalid type: string "2", expected a whole number below 2^64, at byte 39 of the file"#,
        ),
    ),
    case(
        "a dim as null is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[null],"data_offsets":[0,8]}}"#, 8),
        Refused(
            r#"tensor "x": invalid type: null, expected a whole number below 2^64, at byte 40 of the file"#,
        ),
    ),
    case(
        "a dim as true is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[true],"data_offsets":[0,8]}}"#, 8),
        Refused(
            r#"tensor "x": invalid type: boolean `true`, expected a whole number below 2^64, at byte 40 of the file"#,
        ),
    ),
    case(
        "a dim with a leading zero is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[02],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": invalid number, at byte 38 of the file"#),
    ),
    case(
        "a dim with an underscore is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[1_000],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": expected `,` or `]`, at byte 38 of the file"#),
    ),
    case(
        "a dim in hexadecimal is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[0x2],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": expected `,` or `]`, at byte 38 of the file"#),
    ),
    case(
        "a trailing comma in a shape is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2,],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": trailing comma, at byte 39 of the file"#),
    ),
    case(
        "a missing comma in a shape is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[1 2],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": expected `,` or `]`, at byte 39 of the file"#),
    ),
    case(
        "a dim of 2^63 is refused",
        || {
            file(br#"{"x":{"dtype":"U8","shape":[9223372036854775808],"data_offsets":[0,9223372036854775808]}}"#, 8)
        },
        Refused(r#"tensor "x": U8 [9223372036854775808] needs more bits than a 64-bit number counts"#),
    ),
    case(
        "a dim of 2^64 - 1 is refused",
        || {
            file(br#"{"x":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,18446744073709551615]}}"#, 8)
        },
        Refused(r#"tensor "x": U8 [18446744073709551615] needs more bits than a 64-bit number counts"#),
    ),
    case(
        "a dim of 2^64 is refused",
        || file(br#"{"x":{"dtype":"U8","shape":[18446744073709551616],"data_offsets":[0,8]}}"#, 8),
        Refused(
            r#"tensor "x": invalid type: floating point `1.8446744073709552e+19`, expected a whole number below 2^64, at byte 55 of the file"#,
        ),
    ),
    case(
        "a dim beyond f64 is refused",
        || file(br#"{"x":{"dtype":"U8","shape":[1e400],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": number out of range, at byte 40 of the file"#),
    ),
    case(
        "dims whose product is 2^64 are refused",
        || file(br#"{"x":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#, 0),
        Refused(r#"tensor "x": U8 [4294967296, 4294967296] needs more bits than a 64-bit number counts"#),
    ),
    case(
        "dims whose product wraps to eight are refused",
        || file(br#"{"x":{"dtype":"U8","shape":[9223372036854775812,2],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"tensor "x": U8 [9223372036854775812, 2] needs more bits than a 64-bit number counts"#),
    ),
    case(
        "a product that overflows before a zero is refused",
        || file(br#"{"x":{"dtype":"U8","shape":[4294967296,4294967296,0],"data_offsets":[0,0]}}"#, 0),
        Refused(r#"tensor "x": U8 [4294967296, 4294967296, 0] needs more bits than a 64-bit number counts"#),
    ),
    case(
        "a product with a zero before the overflow is accepted",
        || file(br#"{"x":{"dtype":"U8","shape":[0,4294967296,4294967296],"data_offsets":[0,0]}}"#, 0),
        Accepted,
    ),
    case(
        "elements whose bits overflow are refused",
        || {
            file(br#"{"x":{"dtype":"F64","shape":[288230376151711744],"data_offsets":[0,2305843009213693952]}}"#, 8)
        },
        Refused(r#"tensor "x": F64 [288230376151711744] needs more bits than a 64-bit number counts"#),
    ),
    case(
        "a shape whose bits just fit is refused for its data",
        || {
            file(br#"{"x":{"dtype":"U8","shape":[2305843009213693951],"data_offsets":[0,2305843009213693951]}}"#, 8)
        },
        Refused(r#"tensor "x": its data ends at byte 2305843009213694048 of the file, which has 105"#),
    ),
    case(
        "an odd number of F4 is refused",
        || file(br#"{"x":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}"#, 2),
        Refused(r#"tensor "x": F4 [3] needs 12 bits, which are no whole bytes"#),
    ),
    case(
        "two F6 are refused",
        || file(br#"{"x":{"dtype":"F6_E2M3","shape":[2],"data_offsets":[0,2]}}"#, 2),
        Refused(r#"tensor "x": F6_E2M3 [2] needs 12 bits, which are no whole bytes"#),
    ),
    case(
        "a scalar of F4 is refused",
        || file(br#"{"x":{"dtype":"F4","shape":[],"data_offsets":[0,1]}}"#, 1),
        Refused(r#"tensor "x": F4 [] needs 4 bits, which are no whole bytes"#),
    ),
    case(
        "no F4 at all needs no data",
        || file(br#"{"x":{"dtype":"F4","shape":[0],"data_offsets":[0,0]}}"#, 0),
        Accepted,
    ),
    case(
        "data_offsets as null are refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":null}}"#, 8),
        Refused(
            r#"tensor "x": invalid type: null, expected data_offsets: a start and an end, at byte 58 of the file"#,
        ),
    ),
    case(
        "data_offsets as a map are refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":{"0":0,"1":8}}}"#, 8),
        Refused(
            r#"tensor "x": invalid type: map, expected data_offsets: a start and an end, at byte 54 of the file"#,
        ),
    ),
    case(
        "data_offsets as a string are refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":"0,8"}}"#, 8),
        Refused(
            r#"tensor "x": invalid type: string "0,8", expected data_offsets: a start and an end, at byte 59 of the file"#,
        ),
    ),
    case(
        "no data_offsets are refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[]}}"#, 8),
        Refused(
            r#"tensor "x": invalid length 0, expected data_offsets: a start and an end, at byte 56 of the file"#,
        ),
    ),
    case(
        "one data_offset is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0]}}"#, 8),
        Refused(
            r#"tensor "x": invalid length 1, expected data_offsets: a start and an end, at byte 57 of the file"#,
        ),
    ),
    case(
        "three data_offsets are refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8,8]}}"#, 8),
        Refused(r#"tensor "x": trailing characters, at byte 60 of the file"#),
    ),
    case(
        "negative data_offsets are refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}}"#, 8),
        Refused(
            r#"tensor "x": invalid type: integer `-8`, expected a whole number below 2^64, at byte 57 of the file"#,
        ),
    ),
    case(
        "data_offsets as floats are refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0.0,8.0]}}"#, 8),
        Refused(
            r#"tensor "x": invalid type: floating point `0.0`, expected a whole number below 2^64, at byte 58 of the file"#,
        ),
    ),
    case(
        "data_offsets as strings are refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":["0","8"]}}"#, 8),
        Refused(
            r#"tensor "x": invalid type: string "0", expected a whole number below 2^64, at byte 58 of the file"#,
        ),
    ),
    case(
        "data_offsets of 2^64 are refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551616]}}"#, 8),
        Refused(
            r#"tensor "x": invalid type: floating point `1.8446744073709552e+19`, expected a whole number below 2^64, at byte 77 of the file"#,
        ),
    ),
    case(
        "data_offsets that end before they begin are refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, 8),
        Refused(r#"tensor "x": data_offsets [8, 0] end before they begin"#),
    ),
    case(
        "data_offsets that end before they begin at zero data are refused",
        || file(br#"{"x":{"dtype":"F32","shape":[0],"data_offsets":[1,0]}}"#, 0),
        Refused(r#"tensor "x": data_offsets [1, 0] end before they begin"#),
    ),
    case(
        "data_offsets too long for the shape are refused",
        || file(br#"{"x":{"dtype":"F16","shape":[4,8],"data_offsets":[0,96]}}"#, 96),
        Refused(r#"tensor "x": data_offsets span 96 bytes, F16 [4, 8] needs 64"#),
    ),
    case(
        "data_offsets too short for the shape are refused",
        || file(br#"{"x":{"dtype":"F16","shape":[4,8],"data_offsets":[0,32]}}"#, 32),
        Refused(r#"tensor "x": data_offsets span 32 bytes, F16 [4, 8] needs 64"#),
    ),
    case(
        "data that does not begin at zero is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}}"#, 9),
        Refused(
            r#"tensor "x": data_offsets begin at 1, the data before ends at 0: what lies between belongs to no tensor"#,
        ),
    ),
    case(
        "data near 2^64 is refused",
        || {
            file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[18446744073709551600,18446744073709551608]}}"#, 8)
        },
        Refused(
            r#"tensor "x": data_offsets begin at 18446744073709551600, the data before ends at 0: what lies between belongs to no tensor"#,
        ),
    ),
    case(
        "two tensors back to back are accepted",
        || {
            file(br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F16","shape":[4],"data_offsets":[8,16]}}"#, 16)
        },
        Accepted,
    ),
    case(
        "entries against the order of the data are accepted",
        || {
            file(br#"{"b":{"dtype":"F16","shape":[4],"data_offsets":[8,16]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 16)
        },
        Accepted,
    ),
    case(
        "a gap between tensors is refused",
        || {
            file(br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[9,17]}}"#, 17)
        },
        Refused(
            r#"tensor "b": data_offsets begin at 9, the data before ends at 8: what lies between belongs to no tensor"#,
        ),
    ),
    case(
        "a gap of alignment padding is refused",
        || {
            file(br#"{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#, 8)
        },
        Refused(
            r#"tensor "b": data_offsets begin at 4, the data before ends at 3: what lies between belongs to no tensor"#,
        ),
    ),
    case(
        "an overlap of one byte is refused",
        || {
            file(br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[7,15]}}"#, 15)
        },
        Refused(r#"tensor "b": data_offsets begin at 7, inside the tensor before, which ends at 8"#),
    ),
    case(
        "two tensors over the same bytes are refused",
        || {
            file(br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8)
        },
        Refused(r#"tensor "b": data_offsets begin at 0, inside the tensor before, which ends at 8"#),
    ),
    case(
        "a tensor inside another is refused",
        || {
            file(br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 8)
        },
        Refused(r#"tensor "a": data_offsets begin at 0, inside the tensor before, which ends at 4"#),
    ),
    case(
        "a tensor misaligned for its dtype is accepted",
        || {
            file(br#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F64","shape":[1],"data_offsets":[1,9]}}"#, 9)
        },
        Accepted,
    ),
    case(
        "empty tensors at the start are accepted",
        || {
            file(br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"c":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}}"#, 8)
        },
        Accepted,
    ),
    case(
        "empty tensors between others are accepted",
        || {
            file(br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[0],"data_offsets":[8,8]},"c":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#, 16)
        },
        Accepted,
    ),
    case(
        "empty tensors at the end are accepted",
        || {
            file(br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[0],"data_offsets":[8,8]}}"#, 8)
        },
        Accepted,
    ),
    case(
        "an empty tensor inside another is refused",
        || {
            file(br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[0],"data_offsets":[4,4]}}"#, 8)
        },
        Refused(r#"tensor "b": data_offsets begin at 4, inside the tensor before, which ends at 8"#),
    ),
    case(
        "an empty tensor beyond the data is refused",
        || {
            file(br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[0],"data_offsets":[9,9]}}"#, 9)
        },
        Refused(
            r#"tensor "b": data_offsets begin at 9, the data before ends at 8: what lies between belongs to no tensor"#,
        ),
    ),
    case(
        "only empty tensors are accepted",
        || {
            file(br#"{"b":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}}"#, 0)
        },
        Accepted,
    ),
    case(
        "tensors that end eight bytes below 2^64 are refused",
        || {
            file(br#"{"0":{"dtype":"U8","shape":[2305843009213693951],"data_offsets":[0,2305843009213693951]},"1":{"dtype":"U8","shape":[2305843009213693951],"data_offsets":[2305843009213693951,4611686018427387902]},"2":{"dtype":"U8","shape":[2305843009213693951],"data_offsets":[4611686018427387902,6917529027641081853]},"3":{"dtype":"U8","shape":[2305843009213693951],"data_offsets":[6917529027641081853,9223372036854775804]},"4":{"dtype":"U8","shape":[2305843009213693951],"data_offsets":[9223372036854775804,11529215046068469755]},"5":{"dtype":"U8","shape":[2305843009213693951],"data_offsets":[11529215046068469755,13835058055282163706]},"6":{"dtype":"U8","shape":[2305843009213693951],"data_offsets":[13835058055282163706,16140901064495857657]},"7":{"dtype":"U8","shape":[2305843009213693951],"data_offsets":[16140901064495857657,18446744073709551608]}}"#, 8)
        },
        Refused(r#"tensor "0": its data ends at byte 2305843009213694797 of the file, which has 854"#),
    ),
    case(
        "tensors that would wrap around 2^64 are refused",
        || {
            file(br#"{"0":{"dtype":"U8","shape":[2305843009213693951],"data_offsets":[0,2305843009213693951]},"1":{"dtype":"U8","shape":[2305843009213693951],"data_offsets":[2305843009213693951,4611686018427387902]},"2":{"dtype":"U8","shape":[2305843009213693951],"data_offsets":[4611686018427387902,6917529027641081853]},"3":{"dtype":"U8","shape":[2305843009213693951],"data_offsets":[6917529027641081853,9223372036854775804]},"4":{"dtype":"U8","shape":[2305843009213693951],"data_offsets":[9223372036854775804,11529215046068469755]},"5":{"dtype":"U8","shape":[2305843009213693951],"data_offsets":[11529215046068469755,13835058055282163706]},"6":{"dtype":"U8","shape":[2305843009213693951],"data_offsets":[13835058055282163706,16140901064495857657]},"7":{"dtype":"U8","shape":[2305843009213693951],"data_offsets":[16140901064495857657,18446744073709551608]},"8":{"dtype":"U8","shape":[8],"data_offsets":[18446744073709551608,0]}}"#, 8)
        },
        Refused(r#"tensor "8": data_offsets [18446744073709551608, 0] end before they begin"#),
    ),
    case(
        "a file one byte short is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 7),
        Refused(r#"tensor "x": its data ends at byte 70 of the file, which has 69"#),
    ),
    case(
        "a file one byte long is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 9),
        Refused("the data ends at byte 70 of the file, which has 71"),
    ),
    case(
        "a file without its data is refused",
        || file(br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 0),
        Refused(r#"tensor "x": its data ends at byte 70 of the file, which has 62"#),
    ),
    case(
        "a file cut inside the first of two tensors is refused",
        || {
            file(br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#, 7)
        },
        Refused(r#"tensor "a": its data ends at byte 124 of the file, which has 123"#),
    ),
    case(
        "a file cut between two tensors is refused",
        || {
            file(br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#, 8)
        },
        Refused(r#"tensor "b": its data ends at byte 132 of the file, which has 124"#),
    ),
    case(
        "a file cut before its last byte is refused",
        || {
            file(br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#, 15)
        },
        Refused(r#"tensor "b": its data ends at byte 132 of the file, which has 131"#),
    ),
    case(
        "metadata of strings is accepted",
        || {
            file(br#"{"__metadata__":{"format":"pt","a":""},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8)
        },
        Accepted,
    ),
    case(
        "empty metadata is accepted",
        || file(br#"{"__metadata__":{},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Accepted,
    ),
    case(
        "null metadata is accepted",
        || file(br#"{"__metadata__":null,"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Accepted,
    ),
    case("metadata alone is accepted", || file(br#"{"__metadata__":{"format":"pt"}}"#, 0), Accepted),
    case(
        "metadata after the tensors is accepted",
        || {
            file(
                br#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"__metadata__":{"format":"pt"}}"#,
                8,
            )
        },
        Accepted,
    ),
    case(
        "metadata with an escaped name is accepted",
        || {
            file(br#"{"\u005f_metadata__":{"format":"pt"},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8)
        },
        Accepted,
    ),
    case(
        "metadata twice is refused",
        || {
            file(br#"{"__metadata__":{},"__metadata__":{},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8)
        },
        Refused("duplicate field `__metadata__`, at byte 40 of the file"),
    ),
    case(
        "null metadata twice is refused",
        || {
            file(br#"{"__metadata__":null,"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"__metadata__":null}"#, 8)
        },
        Refused("duplicate field `__metadata__`, at byte 95 of the file"),
    ),
    case(
        "metadata with a number is refused",
        || file(br#"{"__metadata__":{"a":1},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused("__metadata__: invalid type: integer `1`, expected a string, at byte 29 of the file"),
    ),
    case(
        "metadata with null is refused",
        || file(br#"{"__metadata__":{"a":null},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused("__metadata__: invalid type: null, expected a string, at byte 32 of the file"),
    ),
    case(
        "metadata with a map is refused",
        || file(br#"{"__metadata__":{"a":{}},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused("__metadata__: invalid type: map, expected a string, at byte 28 of the file"),
    ),
    case(
        "metadata as a list is refused",
        || file(br#"{"__metadata__":[],"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused("__metadata__: invalid type: sequence, expected a map, at byte 23 of the file"),
    ),
    case(
        "metadata as a string is refused",
        || file(br#"{"__metadata__":"pt","x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused(r#"__metadata__: invalid type: string "pt", expected a map, at byte 27 of the file"#),
    ),
    case(
        "metadata as false is refused",
        || file(br#"{"__metadata__":false,"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused("__metadata__: invalid type: boolean `false`, expected a map, at byte 28 of the file"),
    ),
    case(
        "metadata with a key twice keeps the last",
        || {
            file(
                br#"{"__metadata__":{"a":"1","a":"2"},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
                8,
            )
        },
        Accepted,
    ),
    case(
        "metadata with a lone surrogate is refused",
        || {
            file(
                br#"{"__metadata__":{"a":"\ud800"},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
                8,
            )
        },
        Refused("__metadata__: unexpected end of hex escape, at byte 36 of the file"),
    ),
    case(
        "metadata with an escaped NUL is accepted",
        || {
            file(br#"{"__metadata__":{"a\u0000":"\u0000"},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8)
        },
        Accepted,
    ),
    case(
        "a tensor called __metadata__ is refused",
        || file(br#"{"__metadata__":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Refused("__metadata__: invalid type: sequence, expected a string, at byte 46 of the file"),
    ),
    case(
        "a tensor called __metadata__ with only a dtype is metadata",
        || file(br#"{"__metadata__":{"dtype":"F32"}}"#, 0),
        Accepted,
    ),
    case(
        "a name like __metadata__ is a tensor",
        || file(br#"{"__metadata__ ":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        Accepted,
    ),
];
