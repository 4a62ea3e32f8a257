//! What goes to standard output, and how numbers and names look there.

use std::borrow::Cow;
use std::fmt;
use std::io::{self, BufWriter, Write};

use serde::Serialize;

use crate::failure::{Failure, Outcome};

/// Prints text as it is.
pub(crate) fn print(text: impl fmt::Display) -> Outcome {
    to_stdout(|stdout| write!(stdout, "{text}"))
}

/// Prints one JSON object, on a line.
pub(crate) fn print_json(value: &impl Serialize) -> Outcome {
    to_stdout(|stdout| {
        serde_json::to_writer(&mut *stdout, value)?;
        writeln!(stdout)
    })
}

fn to_stdout(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Outcome {
    let mut stdout = BufWriter::with_capacity(1 << 16, io::stdout().lock());
    let written = write(&mut stdout).and_then(|()| stdout.flush());
    // What could not be written is not tried again when the buffer is dropped.
    let _ = stdout.into_parts();
    written.map_err(|error| Failure::of_stdout(&error))
}

/// Escapes control characters: a name in a file is anything, a terminal obeys some of them.
pub(crate) fn printable(text: &str) -> Cow<'_, str> {
    let is_harmless = |letter: char| {
        !letter.is_control() && !matches!(letter, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if text.chars().all(is_harmless) {
        return Cow::Borrowed(text);
    }
    let escape = |letter: char| {
        if is_harmless(letter) { letter.to_string() } else { letter.escape_default().to_string() }
    };
    Cow::Owned(text.chars().map(escape).collect())
}

/// Bytes in units of 1000, as GB/s are: `261.4 kB`.
pub(crate) fn bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    let mut units = ["B", "kB", "MB", "GB", "TB", "PB"].into_iter();
    let mut unit = units.next().unwrap_or_default();
    for larger in units {
        // What would round up to 1000 is one of the next unit.
        if value < 999.95 {
            break;
        }
        (value, unit) = (value / 1000.0, larger);
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") }
}

/// Whole numbers in groups of three: `261,384`.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A number with its noun: `1 file`, `2 files`.
pub(crate) fn count(number: u64, noun: &str) -> String {
    format!("{} {noun}{}", grouped(number), if number == 1 { "" } else { "s" })
}

/// Seconds, to three digits.
pub(crate) fn seconds(seconds: f64) -> String {
    match seconds {
        ..0.001 => format!("{:.0} µs", seconds * 1e6),
        ..1.0 => format!("{:.1} ms", seconds * 1e3),
        _ => format!("{seconds:.2} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!([0, 999, 1000, 261_384].map(bytes), ["0 B", "999 B", "1.0 kB", "261.4 kB"]);
        assert_eq!(bytes(999_999), "1.0 MB");
        assert_eq!(bytes(u64::MAX), "18446.7 PB");
        assert_eq!([1, 999, 1000, 1_234_567].map(grouped), ["1", "999", "1,000", "1,234,567"]);
        assert_eq!([count(1, "file"), count(0, "file")], ["1 file", "0 files"]);
        assert_eq!([0.000_2, 0.25, 12.345].map(seconds), ["200 µs", "250.0 ms", "12.35 s"]);
    }

    #[test]
    fn names_cannot_move_the_cursor() {
        assert_eq!(printable("model.weight ü"), "model.weight ü");
        assert_eq!(printable("a\x1b[2J\n\u{202e}"), "a\\u{1b}[2J\\n\\u{202e}");
    }
}
