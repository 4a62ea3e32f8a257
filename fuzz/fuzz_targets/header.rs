//! A header gets the verdict of the reference crate, but for the listed differences.
//!
//! The input is read twice: as a whole file, and as the length of the data in one byte before the JSON, because
//! no mutation keeps a length prefix true.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../crates/plan/tests/reference/oracle.rs"]
mod oracle;

use oracle::Verdict;

fuzz_target!(|input: &[u8]| {
    check(input);
    if let Some((data_len_bytes, json)) = input.split_first() {
        let prefix = (json.len() as u64).to_le_bytes();
        let data = vec![0; usize::from(*data_len_bytes)];
        check(&[&prefix[..], json, &data].concat());
    }
});

fn check(file: &[u8]) {
    match oracle::compare(file) {
        Verdict::Accepted => {}
        Verdict::Refused(error) => check_text(&error.to_string()),
        Verdict::Differs(oracle::Difference::NameTwice, error) => check_text(&error.to_string()),
    }
}

/// An error is one line, however long the names are that it quotes.
fn check_text(text: &str) {
    assert!(text.len() < 5000 && !text.contains('\n'), "{text}");
}
