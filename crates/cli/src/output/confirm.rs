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
    refuse_nobody()?;
    let answer = ask(&format!("{question} [y/N]"))?;
    match answer.trim().to_ascii_lowercase().as_str() {
        "y" | "yes" => Ok(()),
        _ => Err(Failure::failed("not confirmed; nothing was done")),
    }
}

/// The same for what nobody shall do with a finger that was too quick: the answer is a name.
pub(crate) fn confirm_by_name(what: &str, name: &str, yes: bool) -> Result<(), Failure> {
    note(what);
    if yes {
        return Ok(());
    }
    refuse_nobody()?;
    match ask(&format!("Type {name} to go on:"))?.trim() == name {
        true => Ok(()),
        false => Err(Failure::failed("not confirmed; nothing was done")),
    }
}

fn refuse_nobody() -> Result<(), Failure> {
    if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return Err(Failure::usage("nobody is there to be asked, and nothing was done")
            .because("stdin and stderr are not both a terminal")
            .hint("add --yes to go on without a question"));
    }
    Ok(())
}

fn ask(question: &str) -> Result<String, Failure> {
    let mut stderr = io::stderr();
    let asked = write!(stderr, "{question} ").and_then(|()| stderr.flush());
    asked.map_err(|error| Failure::failed("cannot ask").because(error))?;
    let mut answer = String::new();
    let read = io::stdin().lock().read_line(&mut answer);
    read.map_err(|error| Failure::failed("cannot read the answer").because(error))?;
    Ok(answer)
}
