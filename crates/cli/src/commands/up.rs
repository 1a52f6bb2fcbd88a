//! `pgherd up`: a whole herd on this machine.

use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

use clap::Args;
use pgherd_agent::local::{
    Ask, Attachment, Board, Event, Home, LocalError, Lock, Options, Subscription, Supervisor, attach,
    differing_file,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::args::Global;
use crate::failure::Failure;
use crate::output::{self, note};

mod view;

pub(crate) use view::View;

/// A herd that takes longer is told as timed out; it goes on in the background.
const HEALTHY_WITHIN: Duration = Duration::from_secs(180);
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Start a whole herd on this machine, or go on with the one that is there
///
/// Without a herd file it makes a herd of three PostgreSQL nodes with synchronous replication. Stays in the
/// foreground and shows the herd's status; Ctrl-C stops everything in order. A second one only watches.
#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// Leave the herd running in the background once it is healthy
    #[arg(long)]
    detach: bool,
    /// Be the supervisor in the background
    #[arg(long, hide = true, conflicts_with = "detach")]
    supervise: bool,
}

pub(crate) fn run(args: UpArgs, global: &Global) -> Result<(), Failure> {
    let options = Options {
        dir: global.dir()?,
        herd_file: global.herd.clone().map(absolute).transpose()?,
        program: std::env::current_exe()
            .map_err(|error| Failure::failed("cannot find the program that this is").because(error))?,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|error| Failure::failed("cannot start a runtime").because(error))?;
    if args.supervise {
        // It fails only where the process leads a group already, and then no terminal reaches it either.
        let _already = rustix::process::setsid();
        output::trace_as_log(global.verbose);
        return runtime.block_on(in_background(options));
    }
    output::trace_to_stderr(global.verbose);
    runtime.block_on(async {
        let home = Home::at(&options.dir);
        match Lock::take(&home)? {
            None => {
                note(&format!("the herd in {} is up already; this only watches", home.dir().display()));
                if let Some(file) = &options.herd_file
                    && let Some(differs) = differing_file(home.dir(), Some(file)).await
                {
                    note(&format!("warning: {differs}"));
                }
                watch_another(&home, args.detach).await
            }
            Some(lock) => {
                Supervisor::check(&options).await?;
                if args.detach {
                    drop(lock);
                    detach(&home, &options).await
                } else {
                    in_foreground(&home, lock, options).await
                }
            }
        }
    })
}

fn absolute(path: PathBuf) -> Result<PathBuf, Failure> {
    std::path::absolute(&path).map_err(|error| Failure::io("find", &path, &error))
}

/// The supervisor, with a person in front of it.
async fn in_foreground(home: &Home, lock: Lock, options: Options) -> Result<(), Failure> {
    let supervisor = Supervisor::new(lock, options);
    let board = supervisor.board();
    let mut events = board.watch();
    let mut running = tokio::spawn(supervisor.run());
    let mut signals = signals()?;
    let mut view = View::new(home.clone(), "Ctrl-C stops everything in order");
    let mut asked = 0;
    let outcome = loop {
        tokio::select! {
            Some(event) = events.next() => view.show(&event),
            outcome = &mut running => break outcome,
            Some(()) = signals.recv() => {
                asked += 1;
                if asked > 2 {
                    view.end();
                    note("left everything running; pgherd up takes it over, pgherd down stops it");
                    return Err(Failure::Interrupted);
                }
                answer_interrupt(asked, &board, &mut view);
            }
        }
    };
    // What was told at the very end.
    while let Some(event) = next_at_once(&mut events).await {
        view.show(&event);
    }
    view.end();
    match outcome {
        Ok(outcome) => outcome.map_err(Failure::from),
        Err(error) => Err(Failure::failed("the supervisor has failed")
            .because(error)
            .hint("agents and PostgreSQL go on; pgherd up takes them over")),
    }
}

async fn next_at_once(events: &mut Subscription) -> Option<Event> {
    tokio::time::timeout(Duration::ZERO, events.next()).await.ok().flatten()
}

fn answer_interrupt(asked: u32, board: &Board, view: &mut View) {
    if asked == 1 {
        board.stop();
    } else {
        view.line(
            "still stopping, so that no standby misses anything. Another Ctrl-C ends only this program: agents and \
             PostgreSQL that still run go on, pgherd up takes them over and pgherd down stops them",
        );
    }
}

/// SIGINT, SIGTERM, and the terminal that goes away: all mean the planned stop.
fn signals() -> Result<mpsc::Receiver<()>, Failure> {
    let (sender, receiver) = mpsc::channel(8);
    for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
        let mut signal =
            signal(kind).map_err(|error| Failure::failed("cannot wait for signals").because(error))?;
        let sender = sender.clone();
        tokio::spawn(async move { while signal.recv().await.is_some() && sender.send(()).await.is_ok() {} });
    }
    Ok(receiver)
}

/// The supervisor, with nobody in front of it: what happens goes to its log.
async fn in_background(options: Options) -> Result<(), Failure> {
    // Another one was quicker, and whoever started this one finds that one.
    let Some(lock) = Lock::take(&Home::at(&options.dir))? else { return Ok(()) };
    let supervisor = Supervisor::new(lock, options);
    let board = supervisor.board();
    let mut events = board.watch();
    tokio::spawn(async move {
        while let Some(event) = events.next().await {
            log(&event);
        }
    });
    let mut signals = signals()?;
    let running = tokio::spawn(supervisor.run());
    tokio::spawn(async move {
        while signals.recv().await.is_some() {
            board.stop();
        }
    });
    match running.await {
        Ok(outcome) => outcome.map_err(Failure::from),
        Err(error) => Err(Failure::failed("the supervisor has failed").because(error)),
    }
}

fn log(event: &Event) {
    match event {
        Event::Step { node, text } => tracing::info!(node, "{text}"),
        Event::Trouble { node, text } => tracing::warn!(node, "{text}"),
        Event::Healthy { after_ms } => tracing::info!(after_ms, "healthy"),
        Event::Stopping => tracing::info!("asked to stop"),
        Event::Stopped => tracing::info!("stopped"),
        Event::Failed { message, hint } => tracing::error!(hint, "{message}"),
        Event::Status { .. } => {}
    }
}

/// Starts the supervisor in the background and waits until the herd is healthy.
async fn detach(home: &Home, options: &Options) -> Result<(), Failure> {
    let log = home.open_supervisor_log()?;
    let failed = |error: std::io::Error| Failure::io("write", &home.supervisor_log(), &error);
    let mut command = std::process::Command::new(&options.program);
    command.args(["up", "--supervise", "--dir"]).arg(&options.dir);
    if let Some(file) = &options.herd_file {
        command.arg("--herd").arg(file);
    }
    command.stdin(Stdio::null()).stdout(log.try_clone().map_err(failed)?).stderr(log).current_dir("/");
    let mut child = command.spawn().map_err(|error| Failure::io("run", &options.program, &error))?;
    let attachment = tokio::select! {
        attachment = attach(home, Ask::Watch) => attachment?,
        () = early_end(&mut child) => {
            return Err(LocalError::SupervisorEnded { log: home.supervisor_log() }.into());
        }
    };
    let view = View::new(home.clone(), "the herd goes on in the background; pgherd down stops it");
    until_healthy(attachment, view).await
}

/// Ends when the supervisor ends with a failure. One that found another in its place ends well.
async fn early_end(child: &mut Child) {
    loop {
        match child.try_wait() {
            Ok(Some(status)) if !status.success() => return,
            Ok(Some(_)) | Err(_) => std::future::pending::<()>().await,
            Ok(None) => tokio::time::sleep(LOOK_EVERY).await,
        }
    }
}

async fn until_healthy(mut attachment: Attachment, mut view: View) -> Result<(), Failure> {
    let watching = async {
        while let Some(event) = attachment.next().await {
            view.show(&event);
            match event {
                Event::Healthy { .. } => return Ok(()),
                Event::Failed { message, hint } => {
                    return Err(hint.into_iter().fold(Failure::failed(message), Failure::hint));
                }
                Event::Stopped => return Err(Failure::failed("the herd was stopped before it was healthy")),
                _ => {}
            }
        }
        Err(Failure::failed("the supervisor is gone").hint("agents go on; pgherd up takes them over"))
    };
    let outcome = tokio::select! {
        outcome = tokio::time::timeout(HEALTHY_WITHIN, watching) => outcome.unwrap_or_else(|_| {
            Err(Failure::timed_out(format!("the herd is not healthy after {} s", HEALTHY_WITHIN.as_secs()))
                .hint("it goes on in the background; pgherd explain says what it waits for"))
        }),
        _ = tokio::signal::ctrl_c() => {
            note("the herd goes on in the background; pgherd down stops it");
            Err(Failure::Interrupted)
        }
    };
    view.end();
    outcome
}

/// There is a supervisor already: look over its shoulder.
async fn watch_another(home: &Home, detach: bool) -> Result<(), Failure> {
    let mut attachment = attach(home, Ask::Watch).await?;
    if detach {
        return until_healthy(attachment, View::new(home.clone(), "pgherd down stops it")).await;
    }
    let mut view = View::new(home.clone(), "Ctrl-C only stops watching; pgherd down stops the herd");
    let watching = async {
        while let Some(event) = attachment.next().await {
            view.show(&event);
            if event.is_last() {
                return true;
            }
        }
        false
    };
    let stopped = tokio::select! {
        stopped = watching => stopped,
        _ = tokio::signal::ctrl_c() => {
            view.end();
            note("the herd goes on; pgherd down stops it");
            return Ok(());
        }
    };
    view.end();
    if stopped {
        return Ok(());
    }
    Err(Failure::failed("the supervisor is gone")
        .hint("agents and PostgreSQL go on; pgherd up takes them over"))
}
