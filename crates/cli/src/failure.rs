//! How every command fails: one type, one place where errors of other crates become it, one way to print it.
//!
//! A failure has a message (what happened, with the place), causes (why), hints (the next command), often a
//! stable code, and an exit code. Hazard: a cause that is dropped here is lost to the person who needs it.

use std::fmt::Display;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use pgherd_agent::daemon::DaemonError;
use pgherd_agent::fence::FenceError;
use pgherd_agent::files::Findings;
use pgherd_agent::identity::IdentityError;
use pgherd_agent::local::LocalError;
use pgherd_agent::proxy::ProxyError;
use pgherd_agent::setup::SetupError;
use pgherd_api::{CallError, ExitClass};

/// What a shell reports of a program that ended by Ctrl-C.
const INTERRUPTED_EXIT_CODE: u8 = 130;

#[derive(Debug)]
pub(crate) enum Failure {
    Told(Box<Told>),
    /// Everything has been printed already; only the exit code is left to say.
    Silent(u8),
    /// The reader of stdout went away, as `head` does. Nobody is left to be told.
    OutputClosed,
    /// By Ctrl-C, or by SIGTERM where something has to be taken back.
    Interrupted,
}

#[derive(Debug)]
pub(crate) struct Told {
    class: ExitClass,
    code: Option<String>,
    message: String,
    causes: Vec<String>,
    hints: Vec<String>,
}

impl Failure {
    fn new(class: ExitClass, message: impl Into<String>) -> Failure {
        let (causes, hints) = (Vec::new(), Vec::new());
        Failure::Told(Box::new(Told { class, code: None, message: message.into(), causes, hints }))
    }

    pub(crate) fn failed(message: impl Into<String>) -> Failure {
        Failure::new(ExitClass::Failed, message)
    }

    pub(crate) fn usage(message: impl Into<String>) -> Failure {
        Failure::new(ExitClass::Usage, message)
    }

    pub(crate) fn refused(message: impl Into<String>) -> Failure {
        Failure::new(ExitClass::Refused, message)
    }

    pub(crate) fn timed_out(message: impl Into<String>) -> Failure {
        Failure::new(ExitClass::TimedOut, message)
    }

    pub(crate) fn not_built(what: &str) -> Failure {
        Failure::usage(format!("{what} is not built yet"))
            .because("it is part of the design, and this version does not have it")
            .hint("pgherd --help lists what there is")
    }

    pub(crate) fn io(doing: &str, path: &Path, error: &io::Error) -> Failure {
        let failure = Failure::failed(format!("cannot {doing} {}", path.display())).because(error);
        match error.kind() {
            io::ErrorKind::PermissionDenied => {
                failure.hint("run it as root, or as the user that the agents run as")
            }
            _ => failure,
        }
    }

    /// stdout is gone, or full.
    pub(crate) fn output(error: &io::Error) -> Failure {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::OutputClosed,
            _ => Failure::failed("cannot write to stdout").because(error),
        }
    }

    pub(crate) fn because(mut self, cause: impl Display) -> Failure {
        if let Failure::Told(told) = &mut self {
            told.causes.push(cause.to_string());
        }
        self
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Failure {
        if let Failure::Told(told) = &mut self {
            told.hints.push(hint.into());
        }
        self
    }

    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Failure::Told(told) => told.class.exit_code(),
            Failure::Silent(code) => *code,
            Failure::OutputClosed => 0,
            Failure::Interrupted => INTERRUPTED_EXIT_CODE,
        }
    }

    /// What happened, in one line.
    pub(crate) fn message(&self) -> String {
        match self {
            Failure::Told(told) => told.message.clone(),
            Failure::Interrupted => "interrupted".to_owned(),
            Failure::Silent(_) | Failure::OutputClosed => "failed".to_owned(),
        }
    }

    pub(crate) fn first_hint(&self) -> Option<String> {
        match self {
            Failure::Told(told) => told.hints.first().cloned(),
            _ => None,
        }
    }

    /// As it would be printed.
    pub(crate) fn text(&self) -> String {
        match self {
            Failure::Told(told) => told.text(),
            other => other.message(),
        }
    }

    /// Prints it to stderr, as lines or as one line of JSON.
    pub(crate) fn report(&self, json: bool) -> ExitCode {
        if let Failure::Told(told) = self {
            let text = if json { told.json() } else { told.text() };
            // Without a stderr the exit code has to do.
            let _unread = io::stderr().write_all(text.as_bytes());
        }
        ExitCode::from(self.exit_code())
    }
}

impl Told {
    fn text(&self) -> String {
        let mut text = format!("error: {}", self.message);
        if let Some(code) = &self.code {
            text.push_str(&format!(" [{code}]"));
        }
        text.push('\n');
        let causes = self.causes.iter().map(|cause| ("cause", cause));
        for (what, lines) in causes.chain(self.hints.iter().map(|hint| ("hint", hint))) {
            let mut lines = lines.lines();
            text.push_str(&format!("  {what}: {}\n", lines.next().unwrap_or_default()));
            lines.for_each(|line| text.push_str(&format!("    {line}\n")));
        }
        text
    }

    /// The shape of the API's error body, so that programs read one shape.
    fn json(&self) -> String {
        let joined = |parts: &[String]| (!parts.is_empty()).then(|| parts.join("; "));
        let body = serde_json::json!({
            "code": self.code,
            "message": self.message,
            "cause": joined(&self.causes),
            "hint": joined(&self.hints),
        });
        format!("{body}\n")
    }
}

fn from_body(class: ExitClass, body: pgherd_api::Error) -> Failure {
    Failure::Told(Box::new(Told {
        class,
        code: Some(body.code),
        message: body.message,
        causes: body.cause.into_iter().collect(),
        hints: body.hint.into_iter().collect(),
    }))
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Failure {
        from_body(error.exit_class(), error.to_error())
    }
}

/// An error that travelled on its own: of a change that failed, or from the supervisor of `pgherd up`.
impl From<pgherd_api::Error> for Failure {
    fn from(body: pgherd_api::Error) -> Failure {
        let class = body.exit_class(body.http_status());
        from_body(class, body)
    }
}

impl From<SetupError> for Failure {
    fn from(error: SetupError) -> Failure {
        let hint = error.hint();
        let failure = match error {
            SetupError::Refused(call) => return (*call).into(),
            // A second herd, or somebody else's files: the rules say no, and nothing was changed.
            SetupError::AlreadyMember { .. }
            | SetupError::SomebodyAnswers { .. }
            | SetupError::ForeignStore { .. } => Failure::refused(error.to_string()),
            SetupError::NotInFile { .. } | SetupError::Token(_) => Failure::usage(error.to_string()),
            other => with_sources(&other),
        };
        hint.into_iter().fold(failure, Failure::hint)
    }
}

impl From<IdentityError> for Failure {
    fn from(error: IdentityError) -> Failure {
        let failure = with_sources(&error);
        match error {
            IdentityError::NotAdmitted { .. } => {
                failure.hint("on the first host of a new herd: pgherd init").hint(
                    "to join a herd: pgherd token on one of its hosts, then pgherd agent --token-file here",
                )
            }
            _ => failure,
        }
    }
}

impl From<DaemonError> for Failure {
    fn from(error: DaemonError) -> Failure {
        match error {
            DaemonError::Identity(error) => error.into(),
            other => with_sources(&other),
        }
    }
}

impl From<ProxyError> for Failure {
    fn from(error: ProxyError) -> Failure {
        let hint = error.hint();
        let failure = match error {
            ProxyError::File(findings) => return findings.into(),
            other => with_sources(&other),
        };
        hint.into_iter().fold(failure, Failure::hint)
    }
}

impl From<FenceError> for Failure {
    fn from(error: FenceError) -> Failure {
        with_sources(&error).hint("the agent starts the fence; there is no use in starting it by hand")
    }
}

impl From<LocalError> for Failure {
    fn from(error: LocalError) -> Failure {
        let hint = error.hint();
        let failure = match error {
            LocalError::HerdFile(findings) => return findings.into(),
            LocalError::Unknown { .. } => Failure::refused(error.to_string()),
            LocalError::Deadline { .. } | LocalError::SupervisorSilent { .. } => {
                Failure::timed_out(error.to_string())
            }
            other => with_sources(&other),
        };
        hint.into_iter().fold(failure, Failure::hint)
    }
}

/// The error, and what lies below it as causes, as far as that is not said already.
pub(crate) fn with_sources(error: &dyn std::error::Error) -> Failure {
    let mut failure = Failure::failed(error.to_string());
    let (mut said, mut below) = (error.to_string(), error.source());
    while let Some(cause) = below {
        let text = cause.to_string();
        if !said.contains(&text) {
            failure = failure.because(&text);
            said = text;
        }
        below = cause.source();
    }
    failure
}

/// Mistakes in a file are told as they stand: each with its line and what to do.
impl From<Findings> for Failure {
    fn from(findings: Findings) -> Failure {
        crate::output::note(findings.to_string().trim_end());
        Failure::Silent(ExitClass::Usage.exit_code())
    }
}

#[cfg(test)]
mod tests {
    use pgherd_api::Code;

    use super::*;

    #[test]
    fn a_failure_reads_message_cause_hint() {
        let failure = Failure::refused("no").because("why\nmore of it").hint("pgherd explain");
        let Failure::Told(told) = &failure else { panic!() };
        assert_eq!(told.text(), "error: no\n  cause: why\n    more of it\n  hint: pgherd explain\n");
        assert_eq!(failure.exit_code(), 3);
    }

    #[test]
    fn each_code_keeps_its_exit_class_on_the_way() {
        for code in Code::ALL {
            let failure = Failure::from(pgherd_api::Error::of(*code));
            assert_eq!(failure.exit_code(), code.exit_class().exit_code(), "{code}");
            let Failure::Told(told) = &failure else { panic!() };
            assert!(told.text().contains(code.as_str()) && told.text().contains(code.hint()));
        }
    }

    #[test]
    fn an_error_of_an_agent_is_told_in_its_own_words() {
        let error =
            pgherd_api::Error::new(Code::RedundancyTooLow, "b is the only voter").because("c is gone");
        let call = CallError::Answered { peer: "a".into(), http_status: 409, error };
        let Failure::Told(told) = Failure::from(call) else { panic!() };
        assert!(
            told.text()
                .starts_with("error: b is the only voter [PGH-REDUNDANCY-TOO-LOW]\n  cause: c is gone\n")
        );
        let json: serde_json::Value = serde_json::from_str(&told.json()).unwrap();
        assert_eq!(json["code"], "PGH-REDUNDANCY-TOO-LOW");
    }
}
