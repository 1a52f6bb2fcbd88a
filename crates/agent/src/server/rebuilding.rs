//! A data directory that cannot follow as it is: rewound, or made anew from the repository or from another node.

use pgherd_core::ha::restore;
use pgherd_core::record::Moment;
use pgherd_postgres::clone::Filling;

use super::*;
use crate::backups;
use crate::backups::member::{self, Filled};
use crate::backups::recover::{self, Ahead};
use crate::backups::voted::{self, Voted};
use crate::causes::on_one_line;

/// Then a vote is worth more: what comes next waits for replay as well, and ends what holds it up.
const TAKEN_READ_WITHIN: Duration = Duration::from_secs(5);
const LOOK_AT_REPLAY: Duration = Duration::from_millis(50);
const REWIND_WITHIN: Duration = Duration::from_secs(3600);
/// Without a byte of progress for so long, a copy is given up and begun anew.
const CLONE_STALL: Duration = Duration::from_secs(60);
/// Until the source has a slot for this node.
const SLOT_WITHIN: Duration = Duration::from_secs(10);
/// Between two lines of a log about how far it is.
const TELL_PERCENT: u64 = 10;

impl Server {
    pub(crate) async fn clone_from(&self, source: &NodeName, from: (&str, u16)) -> Result<()> {
        let inner = self.inner()?;
        let member = inner.record().member(&inner.node);
        inner.forget();
        process::ensure_gone(&inner.instance, KILL_WITHIN).await?;
        clone::remove_leftovers(&inner.instance).await?;
        if inner.instance.has_data() {
            clone::discard(&inner.instance).await?;
        }
        let order = clone::CloneOrder {
            source: inner.remote(source, from, secrets::MONITOR).await?,
            replication_password: Secret::new(inner.password(secrets::REPLICATION)?),
            slot: member,
            max_rate_kb: None,
            tablespaces: Vec::new(),
            stall: CLONE_STALL,
        };
        let settings = inner.settings(None)?;
        match inner.fill_from_repository(&order, &settings).await {
            None => {}
            Some(Ok(Filled { backup, bytes, segments, end })) => {
                tracing::info!(backup, bytes, segments, %end, "made from the repository; the rest is streamed");
                return Ok(());
            }
            Some(Err(error)) => {
                let why = on_one_line(&error);
                tracing::info!(why, "not made from the repository; all of it is copied from {source}");
                clone::remove_leftovers(&inner.instance).await?;
            }
        }
        let (progress, watched) = watch::channel(clone::Progress::default());
        let cloning = clone::clone(&inner.instance, &settings, &order, progress);
        let told = tell(watched, |now| (now.done_bytes, now.total_bytes), "cloning");
        tokio::join!(cloning, told).0?;
        Ok(())
    }

    /// Makes the data directory anew from the repository, to end at a moment. What is there goes first.
    pub(crate) async fn restore_to(&self, moment: &Moment) -> Result<()> {
        let inner = self.inner()?;
        inner.forget();
        process::ensure_gone(&inner.instance, KILL_WITHIN).await?;
        clone::remove_leftovers(&inner.instance).await?;
        if inner.instance.has_data() {
            clone::discard(&inner.instance).await?;
        }
        let settings = inner.settings(None)?;
        let Filled { backup, bytes, segments, .. } = inner.fill_up_to(moment, &settings).await?;
        inner.set_running(None);
        let instance = inner.instance.clone();
        let end = blocking_read(move || wal::end_of_wal(&instance, None)).await?;
        let end = SealedEnd::from(&end);
        if !restore::is_end(end.timeline, end.lsn, moment) {
            return Err(MemberError::EndsElsewhere { end: end.lsn, timeline: end.timeline }.into());
        }
        tracing::info!(backup, bytes, segments, %moment, "restored, to be held there");
        Ok(())
    }

    /// Makes the data directory anew of the repository's vote, and sees that PostgreSQL takes it up to its end. What is there goes first.
    /// Returns the timeline of that end.
    pub(crate) async fn inherit(&self, vote: (Timeline, Lsn)) -> Result<Timeline> {
        let inner = self.inner()?;
        inner.forget();
        process::ensure_gone(&inner.instance, KILL_WITHIN).await?;
        clone::remove_leftovers(&inner.instance).await?;
        if inner.instance.has_data() {
            clone::discard(&inner.instance).await?;
        }
        let settings = inner.settings(None)?;
        let Filled { backup, bytes, segments, end: until } = inner.fill_as_voted(vote, &settings).await?;
        inner.set_running(None);
        let instance = inner.instance.clone();
        let end = blocking_read(move || wal::end_of_wal(&instance, None)).await?;
        let (end, timeline) = (end.lsn, end.timeline);
        if end != until {
            return Err(MemberError::EndsElsewhere { end, timeline }.into());
        }
        // It counts as a copy once it is consistent, which only PostgreSQL makes it.
        self.start_sealed().await?;
        inner.see_replayed(until).await?;
        tracing::info!(backup, bytes, segments, %until, %timeline, "made from the repository");
        Ok(timeline)
    }

    /// What the repository had when it voted.
    pub(crate) async fn voted(&self, (timeline, until): (Timeline, Lsn)) -> Result<Voted> {
        let inner = self.inner()?;
        let repository = inner.named_repository().ok_or(MemberError::NotAgreed)?;
        let instance = inner.instance.clone();
        let control = blocking_read(move || control::ControlFile::read(&instance.control_file())).await?;
        let record = inner.record();
        Ok(voted::open(&repository, &record, control.wal_segment_bytes, (timeline, until)).await?)
    }

    /// Puts what this sealed copy lacks of it beside its own WAL.
    pub(crate) async fn take(&self, voted: &Voted) -> Result<()> {
        let inner = self.inner()?;
        let server = inner.live()?;
        let has = self.sealed_end().await?;
        voted.bring(&inner.instance, (has.timeline, has.lsn)).await?;
        {
            let mut known = inner.known();
            (known.sealed, known.idle) = (None, None);
            known.begins.clear();
        }
        // It looks there again at once.
        server.reload()?;
        // A person who promotes it before it has read that takes it onto a timeline without; so the vote comes behind, if nothing holds replay up.
        match tokio::time::timeout(TAKEN_READ_WITHIN, inner.see_replayed(voted.until())).await {
            Ok(read) => read,
            Err(_) => Ok(()),
        }
    }

    /// `true`: the copy is good to follow. `false`: it cannot be rewound and has been removed.
    pub(crate) async fn rewind(&self, source: &NodeName, from: (&str, u16)) -> Result<bool> {
        let inner = self.inner()?;
        inner.forget();
        let order = rewind::RewindOrder {
            source: inner.remote(source, from, secrets::REWIND).await?,
            restore_command: inner.restore_command(),
            deadline: REWIND_WITHIN,
        };
        let settings = inner.settings(None)?;
        let deadline = tokio::time::Instant::now() + CHECKPOINT_WITHIN;
        let rewound = loop {
            let (progress, _) = watch::channel(clone::Progress::default());
            match rewind::rewind(&inner.instance, &settings, &order, progress).await {
                // The source asked for one when its gate opened.
                Err(rewind::RewindError::NotCheckpointed { .. })
                    if tokio::time::Instant::now() < deadline =>
                {
                    tokio::time::sleep(RETRY_EVERY).await;
                }
                outcome => break outcome?,
            }
        };
        inner.set_running(None);
        match rewound {
            rewind::Rewound::NotNeeded { .. } => Ok(true),
            rewind::Rewound::Rewound { fork, source_timeline, saved } => {
                tracing::info!(
                    %fork, %source_timeline,
                    saved_bytes = saved.bytes, saved_commits = saved.commits, saved_in = %saved.dir.display(),
                    "rewound; what that erased is kept beside the data directory"
                );
                Ok(true)
            }
            rewind::Rewound::CannotRewind { why, saved } => {
                let saved_in = saved.map(|saved| saved.dir.display().to_string());
                tracing::info!(why, saved_in, "cannot be rewound, and is made anew");
                clone::discard(&inner.instance).await?;
                Ok(false)
            }
        }
    }
}

impl Inner {
    /// `None`: the cluster has no repository.
    async fn fill_from_repository(
        &self,
        order: &clone::CloneOrder,
        settings: &Settings,
    ) -> Option<std::result::Result<Filled, MemberError>> {
        let repository = self.named_repository()?;
        let fill = async {
            let slot = order.slot.as_ref().ok_or(MemberError::NotAgreed)?;
            let kept_from = self.kept_from(&order.source, slot).await?;
            let order = member::Order { repository, record: self.record(), kept_from };
            self.fill(settings, async |filling, progress| member::fill(&order, filling, progress).await).await
        };
        Some(fill.await)
    }

    fn named_repository(&self) -> Option<RepositorySpec> {
        let spec = self.spec.borrow();
        let named = spec.cluster(&self.cluster)?.backup.as_ref()?.repository.clone();
        drop(spec);
        Some(self.repository(&named))
    }

    async fn fill_as_voted(
        &self,
        vote: (Timeline, Lsn),
        settings: &Settings,
    ) -> std::result::Result<Filled, MemberError> {
        let repository = self.named_repository().ok_or(MemberError::NotAgreed)?;
        let record = self.record();
        self.fill(settings, async |filling, progress| {
            voted::fill(&repository, &record, vote, filling, progress).await
        })
        .await
    }

    /// Waits until the server has replayed everything up to there, however long that takes while it goes on.
    async fn see_replayed(&self, until: Lsn) -> Result<()> {
        let server = self.live()?;
        let (mut last, mut moved) = (None, tokio::time::Instant::now());
        loop {
            if server.is_dead() {
                return Err(ServerError::NotRunning);
            }
            let ready = matches!(server.status(), Ok(Some(process::Status::Ready)));
            if ready && let Ok(view) = self.monitor.lock().await.view(SQL_WITHIN).await {
                if view.replay_lsn >= Some(until) {
                    return Ok(());
                }
                if view.replay_lsn > last {
                    (last, moved) = (view.replay_lsn, tokio::time::Instant::now());
                }
                if moved.elapsed() >= CLONE_STALL {
                    let source_node = NodeName::repository();
                    return Err(ServerError::NotCaughtUp { source_node, wanted: until });
                }
            }
            tokio::time::sleep(LOOK_AT_REPLAY).await;
        }
    }

    async fn fill_up_to(
        &self,
        moment: &Moment,
        settings: &Settings,
    ) -> std::result::Result<Filled, MemberError> {
        let repository = self.named_repository().ok_or(MemberError::NotAgreed)?;
        let record = self.record();
        self.fill(settings, async |filling, progress| {
            member::fill_up_to(&repository, &record, moment, filling, progress).await
        })
        .await
    }

    /// Has the data directory filled, telling how far that is, and makes it one that a server starts on.
    async fn fill(
        &self,
        settings: &Settings,
        fill: impl AsyncFnOnce(
            &Filling,
            &watch::Sender<backups::Progress>,
        ) -> std::result::Result<Filled, MemberError>,
    ) -> std::result::Result<Filled, MemberError> {
        let filling = Filling::begin(&self.instance).await?;
        let (progress, watched) = watch::channel(backups::Progress::default());
        let filled = async {
            let filled = fill(&filling, &progress).await;
            drop(progress);
            filled
        };
        let told = tell(watched, |now| (now.done_bytes, now.total_bytes), "restoring");
        let filled = tokio::join!(filled, told).0?;
        filling.finish(settings).await?;
        Ok(filled)
    }

    /// From where on the source keeps WAL for this node: its agent makes a slot for each incarnation as soon as it has heard of it.
    async fn kept_from(
        &self,
        source: &pgherd_postgres::sql::Remote,
        slot: &Member,
    ) -> std::result::Result<Lsn, MemberError> {
        let deadline = tokio::time::Instant::now() + SLOT_WITHIN;
        loop {
            match slots::kept_from(source, slot, SQL_WITHIN).await? {
                Some(kept_from) => return Ok(kept_from),
                None if tokio::time::Instant::now() >= deadline => return Err(MemberError::NothingKept),
                None => tokio::time::sleep(RETRY_EVERY).await,
            }
        }
    }

    /// For WAL that this node has removed and `pg_rewind` reads. `None`: there is no repository, or it cannot be said in a command.
    fn restore_command(&self) -> Option<String> {
        let program = std::env::current_exe().ok()?;
        self.repository_file.exists().then_some(())?;
        // Nothing is fetched ahead: what lies in the directory beyond the source's files is removed while the program runs.
        recover::restore_command(&program, &self.repository_file, Ahead::Nothing).ok()
    }
}

/// Says how far it is until nobody counts any more.
async fn tell<T>(mut watched: watch::Receiver<T>, of: fn(&T) -> (u64, u64), doing: &str) {
    let mut last = 0;
    while watched.changed().await.is_ok() {
        let (done_bytes, total_bytes) = of(&watched.borrow_and_update());
        let percent = (done_bytes * 100).checked_div(total_bytes).unwrap_or(0);
        if percent >= last + TELL_PERCENT {
            last = percent;
            tracing::info!(done_bytes, "{doing}, {percent} %");
        }
    }
}
