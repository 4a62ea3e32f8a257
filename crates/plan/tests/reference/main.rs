//! We accept and refuse the files that the `safetensors` crate 0.8.0 accepts and refuses, but for the listed
//! differences.

// A failed expectation is the test's own report, in helpers too.
#![allow(clippy::unwrap_used)]

mod cases;
mod generated;
mod oracle;

use cases::{CASES, Case, Expected};
use oracle::{Difference, Verdict, compare};

#[test]
fn every_named_case_has_the_verdict_of_the_reference_and_the_exact_error() {
    let mut wrong = Vec::new();
    for Case { name, file, expected } in CASES {
        let (verdict, error) = match compare(&file()) {
            Verdict::Accepted => (Expected::Accepted, String::new()),
            Verdict::Refused(error) => (Expected::Refused(""), error.to_string()),
            Verdict::Differs(difference, error) => (Expected::Differs(difference, ""), error.to_string()),
        };
        let right = match (expected, &verdict) {
            (Expected::Accepted, Expected::Accepted) => true,
            (Expected::Refused(text), Expected::Refused(_)) => *text == error,
            (Expected::Differs(listed, text), Expected::Differs(found, _)) => {
                listed == found && *text == error
            }
            _ => false,
        };
        if !right {
            wrong.push(format!("{name}:\n  expected {expected:?}\n  found    {verdict:?} {error}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_listed_difference_has_a_case() {
    let listed = Difference::NameTwice; // The only one.
    let shows =
        |case: &Case| matches!(case.expected, Expected::Differs(difference, _) if difference == listed);
    assert!(CASES.iter().any(shows), "{listed:?}");
}

#[test]
fn case_names_are_unique() {
    let mut names: Vec<&str> = CASES.iter().map(|case| case.name).collect();
    names.sort_unstable();
    for pair in names.windows(2) {
        assert_ne!(pair[0], pair[1]);
    }
}

#[test]
fn errors_name_their_tensor_and_bytes_within_reason() {
    for Case { name, file, .. } in CASES {
        let file = file();
        if let Verdict::Refused(error) | Verdict::Differs(_, error) = compare(&file) {
            let text = error.to_string();
            assert!(text.len() < 1000 && !text.contains('\n'), "{name}: {text}");
            assert_eq!(error.tensor().is_some(), text.starts_with("tensor \""), "{name}: {text}");
            assert!(std::error::Error::source(&error).is_none(), "{name}");
            if let Some((start, _)) = error.bytes() {
                let may_lie_beyond = text.contains("data_offsets");
                assert!(start <= file.len() as u64 || may_lie_beyond, "{name}: byte {start}");
            }
        }
    }
}
