//! One look at the local PostgreSQL: its processes, its own view of itself, or its files.

use pgherd_core::types::Stream;

use super::*;

/// How long a look waits for the end of a stopped server's WAL before it does without.
const READING_MAY_DELAY: Duration = Duration::from_millis(5);

impl Inner {
    pub(super) async fn look(&self) -> Seen {
        let began = clock::now();
        let mut seen = Seen {
            began,
            postgres: Postgres::Unknown,
            list: None,
            replay_lag: None,
            replay_lsn: None,
            pending_restart: None,
            gate_open: false,
        };
        match self.find().await {
            Ok(Found::Running(server)) => self.look_at_running(&server, &mut seen).await,
            Ok(Found::Leftovers(_)) => seen.postgres = Postgres::Remains,
            Ok(Found::Nothing) => seen.postgres = self.look_at_files().await,
            Err(error) => tracing::warn!(%error, "cannot look for PostgreSQL's processes"),
        }
        self.known().last = Some(seen.postgres.clone());
        seen
    }

    /// What a look would show right after a promotion: nobody streams yet, and everybody of the herd has a slot.
    pub(super) async fn look_of(&self, promoted: &promote::Promoted, record: &Record) -> Seen {
        let copy = Copy {
            system: record.system,
            timeline: promoted.timeline,
            end: Some(promoted.end),
            begins: self.begins(promoted.timeline).await,
        };
        let slots = record.nodes.keys().filter(|node| **node != self.node).cloned().collect();
        let primary = Primary { copy, flush_lsn: promoted.end, senders: Vec::new(), slots };
        let postgres = Postgres::Primary(primary);
        self.known().last = Some(postgres.clone());
        Seen {
            began: clock::now(),
            postgres,
            list: self.known().proven.clone(),
            replay_lag: None,
            replay_lsn: None,
            pending_restart: None,
            gate_open: false,
        }
    }

    async fn find(&self) -> Result<Found> {
        if let Some(server) = self.running().filter(|server| !server.is_dead()) {
            return Ok(Found::Running(server));
        }
        let found = process::Server::find(&self.instance).await?;
        if let Found::Running(server) = &found {
            tracing::info!(pid = server.pid(), "found PostgreSQL running, and goes on with it");
            self.forget();
            *self.running.lock().unwrap_or_else(PoisonError::into_inner) = Some(server.clone());
        } else if self.running.lock().unwrap_or_else(PoisonError::into_inner).take().is_some() {
            tracing::info!("PostgreSQL has ended");
            self.forget();
        }
        Ok(found)
    }

    async fn look_at_running(&self, server: &process::Server, seen: &mut Seen) {
        if !matches!(server.status(), Ok(Some(process::Status::Ready))) {
            seen.postgres = self.look_at_starting().await;
            return;
        }
        let view = self.monitor.lock().await.view(SQL_WITHIN).await;
        let view = match view {
            Ok(view) => view,
            Err(error) => {
                tracing::debug!(%error, "PostgreSQL does not tell its state");
                // What was seen before is old, and still the best that is known: a busy server is no other one.
                seen.postgres = self.known().last.clone().unwrap_or(Postgres::Starting);
                return;
            }
        };
        let physical = view.slots.iter().filter(|slot| !slot.logical);
        self.known().slots = physical.map(|slot| slot.name.clone()).collect();
        seen.gate_open = self.gate().await == Gate::Open;
        seen.pending_restart = Some(!view.pending_restart.is_empty());
        if view.in_recovery {
            seen.replay_lsn = view.replay_lsn;
            seen.replay_lag = view.replay_age_ms.map(|ms| Duration::from_secs_f64(ms.max(0.0) / 1000.0));
            seen.postgres = self.standby(&view).await;
        } else {
            seen.list = self.list_in_force(&view);
            seen.postgres = self.primary(&view).await;
        }
    }

    /// A server that is not open for queries yet. It is a standby, as everything that is started here is, and
    /// one that was rewound or crashed may need WAL from its upstream before it opens: so it must be possible
    /// to point it there, by what its files tell.
    async fn look_at_starting(&self) -> Postgres {
        match self.copy_at_rest().await {
            Some(copy) if copy.end.is_some() => {
                let follows = self.known().follows.clone();
                Postgres::Standby(Standby { copy, follows, receiving: false, diverged: false })
            }
            _ => Postgres::Starting,
        }
    }

    /// The gate as it was set last. An agent that comes back finds it in the file as the last one left it.
    pub(super) async fn gate(&self) -> Gate {
        if let Some(gate) = self.known().gate {
            return gate;
        }
        let written = hba::written(&self.instance).await.ok().flatten();
        let gate = written.unwrap_or(Gate::Closed);
        self.known().gate = Some(gate);
        gate
    }

    async fn primary(&self, view: &View) -> Postgres {
        let record = self.record();
        let senders = view.senders.iter().filter_map(|sender| {
            // Whoever was taken along from the timeline before has not adopted this one, and does not count.
            let stream: Option<Stream> = sender.application_name.parse().ok();
            let member = stream.filter(|stream| stream.timeline == view.timeline).map(|stream| stream.member);
            let genuine = member.as_ref().is_some_and(|member| is_genuine(sender, member, &record));
            Some(Sender {
                pid: u32::try_from(sender.pid).ok()?,
                member,
                genuine,
                streaming: sender.state.as_deref() == Some("streaming"),
                flush_lsn: sender.flush_lsn,
            })
        });
        let slots: BTreeSet<NodeName> = record
            .nodes
            .keys()
            .filter(|node| {
                let name = record.member(node).map(|member| conf::slot_name(&member));
                name.is_some_and(|name| view.slots.iter().any(|slot| slot.name == name && !slot.logical))
            })
            .cloned()
            .collect();
        let flush_lsn = view.flush_lsn.unwrap_or_default();
        Postgres::Primary(Primary {
            copy: Copy {
                system: Some(view.system_id),
                timeline: view.timeline,
                end: Some(flush_lsn),
                begins: self.begins(view.timeline).await,
            },
            flush_lsn,
            senders: senders.collect(),
            slots,
        })
    }

    async fn standby(&self, view: &View) -> Postgres {
        let streaming =
            view.receiver.as_ref().filter(|receiver| receiver.status.as_deref() == Some("streaming"));
        if let Some(timeline) = streaming.and_then(|receiver| receiver.timeline) {
            self.begins(timeline).await;
            self.known().streamed = Some(timeline);
        }
        self.known().replayed = view.replay_lsn;
        let receiving =
            view.receiver.as_ref().is_some_and(|receiver| receiver.status.as_deref() == Some("streaming"));
        let copy = if receiving {
            Some(Copy {
                system: Some(view.system_id),
                timeline: view.timeline,
                end: view.receive_lsn.max(view.replay_lsn),
                begins: self.begins(view.timeline).await,
            })
        } else {
            self.idle_copy(view).await
        };
        let Some(copy) = copy else { return Postgres::Starting };
        let follows = self.known().follows.clone();
        Postgres::Standby(Standby { copy, follows, receiving, diverged: false })
    }

    /// A standby that receives nothing: the end is read from its WAL, once for each replay position, because
    /// what it says of itself counts torn records, or nothing after a restart (ha-attack S2).
    async fn idle_copy(&self, view: &View) -> Option<Copy> {
        if let Some((at, copy)) = &self.known().idle
            && *at == view.replay_lsn
        {
            return Some(copy.clone());
        }
        let known = self.replayed();
        let instance = self.instance.clone();
        match blocking_read(move || wal::end_of_wal(&instance, known)).await {
            Ok(end) => {
                let copy = copy_of(&end, Some(view.system_id));
                self.known().idle = Some((view.replay_lsn, copy.clone()));
                Some(copy)
            }
            Err(error) => {
                tracing::warn!(%error, "cannot find the end of WAL");
                None
            }
        }
    }

    /// A place up to which WAL is known to be whole.
    pub(super) fn replayed(&self) -> Option<Boundary> {
        let known = self.known();
        let (streamed, lsn) = (known.streamed?, known.replayed?);
        // What was replayed may lie before the fork of the timeline that is streamed. A boundary on the wrong
        // timeline would hide everything behind the fork, and the vote would claim too little.
        let begins = known.begins.get(&streamed)?;
        let of = begins.iter().filter(|(_, begin)| *begin < lsn).map(|(timeline, _)| *timeline).max();
        of.map(|timeline| Boundary { timeline, lsn })
    }

    async fn look_at_files(&self) -> Postgres {
        if !self.instance.has_data() {
            return Postgres::Absent;
        }
        self.copy_at_rest().await.map_or(Postgres::Unknown, Postgres::Stopped)
    }

    /// What the files tell while no server answers: once for each life of it. The end of WAL may take a while
    /// to find, and giving a term back does not need it: so it is read beside, and unknown until then.
    async fn copy_at_rest(&self) -> Option<Copy> {
        if let Some(copy) = self.known().at_rest.clone() {
            return Some(copy);
        }
        let instance = self.instance.clone();
        let read = blocking_read(move || {
            let control = control::ControlFile::read(&instance.control_file())?;
            Ok((control.system_id, control.timeline()))
        });
        let Ok((system, timeline)) = read.await else {
            tracing::warn!("cannot read pg_control");
            return None;
        };
        let unread = Copy { system: Some(system), timeline, end: None, begins: Vec::new() };
        let begun = self.known().reading.take();
        let mut reading = begun.unwrap_or_else(|| {
            let instance = self.instance.clone();
            tokio::task::spawn_blocking(move || wal::end_of_wal(&instance, None))
        });
        match tokio::time::timeout(READING_MAY_DELAY, &mut reading).await {
            Ok(Ok(Ok(end))) => {
                let copy = copy_of(&end, Some(system));
                self.known().at_rest = Some(copy.clone());
                Some(copy)
            }
            Ok(Ok(Err(error))) => {
                tracing::warn!(%error, "cannot find the end of WAL");
                Some(unread)
            }
            Ok(Err(_)) => Some(unread),
            Err(_) => {
                self.known().reading = Some(reading);
                Some(unread)
            }
        }
    }

    async fn begins(&self, timeline: Timeline) -> Vec<(Timeline, Lsn)> {
        if let Some(begins) = self.known().begins.get(&timeline) {
            return begins.clone();
        }
        let pg_wal = self.instance.pg_wal();
        let read = blocking_read(move || wal::history::History::read(&pg_wal, timeline)).await;
        let Ok(Some(history)) = read else { return Vec::new() };
        let begins: Vec<_> =
            history.timelines().filter_map(|number| Some((number, history.begin_of(number)?))).collect();
        self.known().begins.insert(timeline, begins.clone());
        begins
    }

    /// The list that commits wait under: what a session shows, if it is what was proven, and what every WAL
    /// sender counts by.
    fn list_in_force(&self, view: &View) -> Option<SyncList> {
        let proven = self.known().proven.clone()?;
        let names = names_of(&proven);
        let agree = view.senders.iter().all(|sender| {
            let listed = proven.names.iter().any(|stream| stream.to_string() == sender.application_name);
            // One that counts nobody yet will count by the present list.
            sender.sync_priority.is_none_or(|priority| priority == 0 || listed)
        });
        (view.synchronous_standby_names == names.to_string() && agree).then_some(proven)
    }
}

fn copy_of(end: &EndOfWal, system: Option<pgherd_core::types::SystemId>) -> Copy {
    let sealed = SealedEnd::from(end);
    Copy { system, timeline: sealed.timeline, end: Some(sealed.lsn), begins: sealed.begins }
}

/// A name proves nothing: the certificate must be that node's, the slot that member's own, and the member the
/// node's present one. The repository has no certificate: for it streams a node that owns the archive, or did a moment ago, which is any of the record's.
/// What such a one may confirm ends with its term, by the seal.
fn is_genuine(sender: &observe::Sender, member: &Member, record: &Record) -> bool {
    let is_named = |node: &NodeName| sender.client_dn.as_deref() == Some(format!("/CN={node}").as_str());
    let certified = match member.node.is_repository() {
        true => record.nodes.keys().filter(|node| !node.is_repository()).any(is_named),
        false => is_named(&member.node),
    };
    let own_slot = sender.slot.as_deref() == Some(conf::slot_name(member).as_str());
    certified && own_slot && record.member(&member.node).as_ref() == Some(member)
}

#[cfg(test)]
mod tests {
    use pgherd_core::record::NodeRecord;
    use pgherd_core::types::Incarnation;

    use super::*;

    /// `a` leads and owns the archive, `b` is its standby, and the repository is a member.
    fn record() -> Record {
        let mut record = Record::empty();
        let names = ["a".parse().unwrap(), "b".parse().unwrap(), NodeName::repository()];
        for (name, incarnation) in names.into_iter().zip([1, 2, 7]) {
            let entry = NodeRecord { incarnation: Incarnation(incarnation), barred: None };
            record.nodes.insert(name, entry);
        }
        record
    }

    fn sender(certificate: &str, member: &Member) -> observe::Sender {
        observe::Sender {
            pid: 1,
            application_name: format!("{member}.1"),
            address: None,
            role: None,
            client_dn: Some(format!("/CN={certificate}")),
            slot: Some(conf::slot_name(member)),
            state: None,
            sync_state: None,
            sync_priority: None,
            sent_lsn: None,
            write_lsn: None,
            flush_lsn: None,
            replay_lsn: None,
            replay_lag_ms: None,
            reply_age_ms: None,
        }
    }

    #[test]
    fn for_the_repository_a_node_of_the_record_streams_and_for_a_node_only_that_one() {
        let record = record();
        let (repository, b) = (record.repository().unwrap(), record.member(&"b".parse().unwrap()).unwrap());
        let is =
            |certificate: &str, member: &Member| is_genuine(&sender(certificate, member), member, &record);
        assert!(is("a", &repository) && is("b", &repository) && is("b", &b));
        assert!(!is("a", &b), "a is not b");
        assert!(!is("w", &repository) && !is("pgherd_repository", &repository), "no node of the record");
        let former = Member { incarnation: Incarnation(3), ..repository.clone() };
        assert!(!is("a", &former), "its seals are another one's");
        let elsewhere = observe::Sender { slot: Some("b_2".to_owned()), ..sender("a", &repository) };
        assert!(!is_genuine(&elsewhere, &repository, &record));
    }
}
