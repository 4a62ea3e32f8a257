//! Reads from PTX what a driver tells about it: the kernels and the size of their parameters.

use crate::kernels::Entry;

/// Returns the kernels of a module; `None` when the text is no PTX.
pub(crate) fn entries(text: &str) -> Option<Vec<Entry>> {
    let is_header = |line: &str| line.starts_with(".version ");
    text.lines().map(str::trim).find(|line| is_header(line))?;
    text.split(".entry ").skip(1).map(entry).collect()
}

/// Reads `cast( .param .align 8 .b8 cast_param_0[32] ) ...`.
fn entry(text: &str) -> Option<Entry> {
    let (name, rest) = text.split_once('(')?;
    let (params, _) = rest.split_once(')')?;
    let mut params_len = 0u64;
    for param in params.split(',').map(str::trim).filter(|param| !param.is_empty()) {
        let (align, len) = param_layout(param)?;
        params_len = params_len.next_multiple_of(align) + len;
    }
    Some(Entry { name: name.trim().to_owned(), params_len })
}

/// Returns the alignment and the length of `.param .align 8 .b8 name[32]` or `.param .u64 name`.
fn param_layout(param: &str) -> Option<(u64, u64)> {
    let mut words = param.strip_prefix(".param")?.split_whitespace();
    let mut word = words.next()?;
    let mut align = None;
    if word == ".align" {
        align = Some(words.next()?.parse().ok()?);
        word = words.next()?;
    }
    let width = word.trim_start_matches(|first: char| !first.is_ascii_digit()).parse::<u64>().ok()? / 8;
    let count = match words.next()?.split_once('[') {
        Some((_, count)) => count.strip_suffix(']')?.parse().ok()?,
        None => 1,
    };
    Some((align.unwrap_or(width), width * count))
}
