//! Patterns for names of modules, as the various configurations write them.

use std::borrow::Cow;
use std::collections::HashMap;

use regex::{RegexSet, RegexSetBuilder};

use crate::quant::QuantError;

/// What a pattern's text means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::quant) enum Syntax {
    /// The whole name.
    Exact,
    /// Any part of the name.
    Part,
    /// `*`, `?` and `[...]`; the whole name.
    Wildcards,
    /// A regular expression, from the start of the name.
    Regex,
}

/// A list of patterns that is asked for the first that matches, all at once and in time linear in the name.
#[derive(Clone, Debug)]
pub(in crate::quant) struct Patterns {
    texts: Vec<String>,
    exact: HashMap<String, usize>,
    regexes: RegexSet,
    /// The place in `texts` of each regular expression.
    places: Vec<usize>,
}

impl Patterns {
    /// Compiles patterns; `file` and `key` say where they are from.
    pub(in crate::quant) fn new<'p>(
        file: &str,
        key: &str,
        patterns: impl IntoIterator<Item = (Syntax, &'p str)>,
    ) -> Result<Patterns, QuantError> {
        let (mut texts, mut exact, mut regexes, mut places) =
            (Vec::new(), HashMap::new(), Vec::new(), Vec::new());
        for (syntax, text) in patterns {
            match expression(syntax, text) {
                None => _ = exact.entry(text.to_owned()).or_insert(texts.len()),
                Some(regex) => {
                    regexes.push(regex);
                    places.push(texts.len());
                }
            }
            texts.push(text.to_owned());
        }
        let bad = |found: String, expected: String| QuantError::ConfigValue {
            file: file.to_owned(),
            key: key.to_owned(),
            found,
            expected,
        };
        if regexes.len() > PATTERN_COUNT_MAX {
            let expected = format!("at most {PATTERN_COUNT_MAX}");
            return Err(bad(format!("{} patterns", regexes.len()), expected));
        }
        let build = |regexes: &[String]| {
            RegexSetBuilder::new(regexes)
                .size_limit(COMPILED_LEN_BYTES_MAX)
                .dfa_size_limit(COMPILED_LEN_BYTES_MAX)
                .nest_limit(NEST_MAX)
                .build()
        };
        let compiled = build(&regexes).map_err(|_| {
            // Find the pattern at fault; none where they are too many together.
            let faulty = regexes.iter().position(|regex| build(std::slice::from_ref(regex)).is_err());
            let found = faulty
                .map_or("too many patterns".to_owned(), |faulty| format!("{:?}", texts[places[faulty]]));
            bad(found, "a regular expression without look-around or references".to_owned())
        })?;
        Ok(Patterns { texts, exact, regexes: compiled, places })
    }

    /// Returns patterns that match nothing.
    pub(in crate::quant) fn none() -> Patterns {
        Patterns { texts: Vec::new(), exact: HashMap::new(), regexes: RegexSet::empty(), places: Vec::new() }
    }

    /// Returns the place of the first pattern that matches the module, under its own name or as other writers spell it.
    pub(in crate::quant) fn first(&self, module: &str) -> Option<usize> {
        if self.texts.is_empty() {
            return None;
        }
        spellings(module).into_iter().flatten().find_map(|name| self.first_spelled(&name))
    }

    /// Returns the text of a pattern.
    pub(in crate::quant) fn text(&self, place: usize) -> &str {
        &self.texts[place]
    }

    fn first_spelled(&self, name: &str) -> Option<usize> {
        let exact = self.exact.get(name).copied();
        let regex = match self.places.is_empty() {
            true => None,
            false => self.regexes.matches(name).iter().next().map(|regex| self.places[regex]),
        };
        exact.into_iter().chain(regex).min()
    }
}

/// Returns the regular expression of a pattern, `None` where a comparison does.
fn expression(syntax: Syntax, text: &str) -> Option<String> {
    match syntax {
        Syntax::Exact => None,
        Syntax::Part => Some(regex::escape(text)),
        Syntax::Wildcards if !text.contains(['*', '?', '[']) => None,
        Syntax::Wildcards => Some(wildcards(text)),
        Syntax::Regex => Some(format!("^(?:{text})")),
    }
}

/// # Source
/// Python's `fnmatch`: `*`, `?`, `[seq]`, `[!seq]`; a bracket that is never closed stands for itself.
fn wildcards(text: &str) -> String {
    let mut regex = String::from("(?s)^");
    let mut rest = text;
    while let Some(char) = rest.chars().next() {
        rest = &rest[char.len_utf8()..];
        match char {
            '*' => regex.push_str(".*"),
            '?' => regex.push('.'),
            '[' => match set(rest) {
                Some((set, after)) => {
                    regex.push_str(&set);
                    rest = after;
                }
                None => regex.push_str("\\["),
            },
            other => regex.push_str(&regex::escape(other.encode_utf8(&mut [0; 4]))),
        }
    }
    regex.push('$');
    regex
}

/// Returns the class of a set whose opening bracket is before `rest`, and what follows it.
fn set(rest: &str) -> Option<(String, &str)> {
    let negated = rest.starts_with('!');
    let members = &rest[usize::from(negated)..];
    // A bracket right at the start is a member.
    let first = members.chars().next()?.len_utf8();
    let end = first + members[first..].find(']')?;
    let mut class = String::from(if negated { "[^" } else { "[" });
    for char in members[..end].chars() {
        if matches!(char, '[' | ']' | '\\' | '^' | '&' | '~') {
            class.push('\\');
        }
        class.push(char);
    }
    class.push(']');
    Some((class, &members[end + 1..]))
}

/// Returns the names that configurations may use for a module: its own, then those that other orders of the prefixes of multimodal
/// models give.
fn spellings(module: &str) -> [Option<Cow<'_, str>>; 3] {
    let joined = |prefix: &str, rest: &str| Some(Cow::Owned(format!("{prefix}{rest}")));
    let others = if let Some(rest) = module.strip_prefix("model.language_model.") {
        [joined("language_model.model.", rest), joined("model.", rest)]
    } else if let Some(rest) = module.strip_prefix("language_model.model.") {
        [joined("model.language_model.", rest), joined("model.", rest)]
    } else {
        [module.strip_prefix("language_model.").map(Cow::Borrowed), None]
    };
    let [second, third] = others;
    [Some(Cow::Borrowed(module)), second, third]
}

/// The most patterns of one list, exact names not counted. ModelOpt lists a few for each layer.
const PATTERN_COUNT_MAX: usize = 1 << 14;
/// The most memory that the patterns of one list take, compiled.
const COMPILED_LEN_BYTES_MAX: usize = 64 << 20;
/// The deepest nesting of a pattern.
const NEST_MAX: u32 = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_match_as_in_python() {
        let cases = [
            ("model.layers.*.self_attn", "model.layers.3.self_attn", true),
            ("model.layers.*.self_attn", "model.layers.3.self_attn.q_proj", false),
            ("a[!0-3]b", "a4b", true),
            ("a[!0-3]b", "a2b", false),
            ("a[]]b", "a]b", true),
            ("a[b", "a[b", true),
            ("a?c", "abc", true),
            ("a.c", "abc", false),
        ];
        for (pattern, name, expected) in cases {
            let patterns = Patterns::new("f", "k", [(Syntax::Wildcards, pattern)]).expect("a pattern");
            assert_eq!(patterns.first(name).is_some(), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn the_first_pattern_wins_whatever_its_kind() {
        let list = [(Syntax::Regex, r".*\.q_proj"), (Syntax::Exact, "a.q_proj"), (Syntax::Part, "proj")];
        let patterns = Patterns::new("f", "k", list).expect("patterns");
        assert_eq!(patterns.first("a.q_proj"), Some(0));
        assert_eq!(patterns.first("a.k_proj"), Some(2));
        assert_eq!(patterns.first("a.mlp"), None);
    }

    #[test]
    fn a_pattern_that_is_none_is_named() {
        let error = Patterns::new("config.json", "dynamic", [(Syntax::Regex, "a"), (Syntax::Regex, "(?!b)")]);
        let error = error.expect_err("look-ahead");
        assert!(error.to_string().starts_with("config.json: dynamic is \"(?!b)\""), "{error}");
    }

    #[test]
    fn prefixes_of_multimodal_models_come_in_any_order() {
        let patterns = Patterns::new("f", "k", [(Syntax::Exact, "language_model.model.layers.0.q")]);
        let patterns = patterns.expect("a name");
        assert_eq!(patterns.first("model.language_model.layers.0.q"), Some(0));
    }
}
