//! An error for a log or an operator: with its causes, since what is missing often stands in the last one.

use std::error::Error;

/// A cause that has been told already is left out: many errors name their source in their own text.
pub(crate) fn on_one_line(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let next_text = next.to_string();
        if !text.contains(&next_text) {
            text.push_str(": ");
            text.push_str(&next_text);
        }
        cause = next.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Told {
        text: &'static str,
        source: Option<Box<Told>>,
    }

    #[test]
    fn a_cause_is_told_once() {
        let last = Told { text: "no such file", source: None };
        let middle = Told { text: "cannot read: no such file", source: Some(Box::new(last)) };
        let first = Told { text: "the certificate", source: Some(Box::new(middle)) };
        assert_eq!(on_one_line(&first), "the certificate: cannot read: no such file");
    }
}
