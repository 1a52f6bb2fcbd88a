//! Asking before something is interrupted or destroyed.
//!
//! Hazard: a script that goes on because nobody could answer. Where stdin or stderr is no terminal the answer
//! is no, and the command that would have asked fails and names `--yes`.

use std::io::{self, BufRead, IsTerminal, Write};

use crate::failure::Failure;
use crate::output::note;

/// Says `what` will happen, and returns only after a yes. `yes` is the command's `--yes`.
pub(crate) fn confirm(what: &str, question: &str, yes: bool) -> Result<(), Failure> {
    note(what);
    if yes {
        return Ok(());
    }
    if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return Err(Failure::usage("nobody is there to be asked, and nothing was done")
            .because("stdin and stderr are not both a terminal")
            .hint("add --yes to go on without a question"));
    }
    let answer = ask(question)?;
    match answer.trim().to_ascii_lowercase().as_str() {
        "y" | "yes" => Ok(()),
        _ => Err(Failure::failed("not confirmed; nothing was done")),
    }
}

fn ask(question: &str) -> Result<String, Failure> {
    let mut stderr = io::stderr();
    let asked = write!(stderr, "{question} [y/N] ").and_then(|()| stderr.flush());
    asked.map_err(|error| Failure::failed("cannot ask").because(error))?;
    let mut answer = String::new();
    let read = io::stdin().lock().read_line(&mut answer);
    read.map_err(|error| Failure::failed("cannot read the answer").because(error))?;
    Ok(answer)
}
