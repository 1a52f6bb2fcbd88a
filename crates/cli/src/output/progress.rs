//! How far something is, on a terminal only, and that Ctrl-C and SIGTERM end it.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use pgherd_agent::backups::Progress;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::numbers::bytes;
use crate::failure::Failure;

const DRAW_EVERY: Duration = Duration::from_millis(250);

/// Does work that reports how far it is. Ctrl-C and SIGTERM drop it; `behind` is what it still does when all bytes are through.
pub(crate) async fn shown<T>(
    what: &str,
    behind: &str,
    mut progress: watch::Receiver<Progress>,
    work: impl Future<Output = T>,
) -> Result<T, Failure> {
    let bar = match std::io::stderr().is_terminal() {
        true => ProgressBar::new(0),
        false => ProgressBar::hidden(),
    };
    let style = ProgressStyle::with_template("{spinner} {msg} {wide_bar} {percent:>3}% {prefix}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(DRAW_EVERY);
    // From here on, and not from when the work has begun.
    let waited =
        |kind| signal(kind).map_err(|error| Failure::failed("Ctrl-C cannot be waited for").because(error));
    let (mut interrupts, mut ends) = (waited(SignalKind::interrupt())?, waited(SignalKind::terminate())?);
    let mut work = std::pin::pin!(work);
    let done = loop {
        tokio::select! {
            done = &mut work => break Ok(done),
            _ = interrupts.recv() => break Err(Failure::Interrupted),
            _ = ends.recv() => break Err(Failure::Interrupted),
            Ok(()) = progress.changed() => {
                let Progress { done_bytes, total_bytes, step, held_to, .. } = *progress.borrow();
                bar.set_length(total_bytes);
                bar.set_position(done_bytes.min(total_bytes));
                bar.set_prefix(match total_bytes {
                    0 => bytes(done_bytes),
                    total => format!("{} of {}", bytes(done_bytes), bytes(total)),
                });
                let is_over = total_bytes > 0 && done_bytes >= total_bytes;
                let doing = step.unwrap_or(if is_over { behind } else { what });
                bar.set_message(match held_to.filter(|_| !is_over) {
                    Some(to) => format!("{doing}, held back to {} a second for clients", bytes(to)),
                    None => doing.to_owned(),
                });
            }
        }
    };
    bar.finish_and_clear();
    done
}
