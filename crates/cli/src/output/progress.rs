//! How far something is, on a terminal only, and that Ctrl-C ends it.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use pgherd_agent::backups::Progress;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::numbers::bytes;
use crate::failure::Failure;

const DRAW_EVERY: Duration = Duration::from_millis(250);

/// Does work that reports how far it is. Ctrl-C drops it; `behind` is what it still does when all bytes are through.
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
    let mut interrupts = signal(SignalKind::interrupt())
        .map_err(|error| Failure::failed("Ctrl-C cannot be waited for").because(error))?;
    let mut work = std::pin::pin!(work);
    let done = loop {
        tokio::select! {
            done = &mut work => break Ok(done),
            _ = interrupts.recv() => break Err(Failure::Interrupted),
            Ok(()) = progress.changed() => {
                let Progress { done_bytes, total_bytes, .. } = *progress.borrow();
                bar.set_length(total_bytes);
                bar.set_position(done_bytes.min(total_bytes));
                bar.set_prefix(format!("{} of {}", bytes(done_bytes), bytes(total_bytes)));
                if total_bytes > 0 && done_bytes >= total_bytes {
                    bar.set_message(behind.to_owned());
                }
            }
        }
    };
    bar.finish_and_clear();
    done
}
