//! An owner that streams in the name of a member of the rule, over a store that loses calls and answers and carries puts out late, and somebody
//! who seals it: whatever is reported, at any time, is in what was listed behind the seal.

use super::*;

/// Where what is there ends in the beginning.
const BEGINS: Lsn = Lsn(2 * SEG + 70_000);
const LAST: Lsn = Lsn(4 * SEG + 5_000);

/// A call on its way.
#[derive(Clone, Debug)]
enum Call {
    Put(Option<Ticket>, (Lsn, Lsn)),
    Ask(Question),
}

/// An answer on its way back.
#[derive(Clone, Copy, Debug)]
enum Told {
    Put(Ticket, bool),
    Answer(Question, Answer),
}

#[derive(Debug, Default)]
struct Place {
    spans: Vec<(Lsn, Lsn)>,
    is_sealed: bool,
}

impl Place {
    fn end(&self) -> Lsn {
        let mut reached = BEGINS;
        while let Some((_, further)) = self.spans.iter().find(|(from, to)| *from <= reached && *to > reached)
        {
            reached = *further;
        }
        reached
    }
}

struct Voted {
    receiver: Receiver,
    random: Random,
    place: Place,
    calls: Vec<Call>,
    answers: Vec<Told>,
    /// What the sealer has found.
    listed: Option<Lsn>,
}

fn span(object: &Object) -> (Lsn, Lsn) {
    let (segment, from) = match object {
        Object::Segment { segment, .. } | Object::Partial { segment, .. } => (segment, 0),
        Object::Piece { segment, from, .. } => (segment, u64::from(*from)),
        Object::History { .. } => panic!("its history is there"),
    };
    let start = Lsn(segments().start(*segment).0 + from);
    (start, Lsn(start.0 + object.content().len() as u64))
}

impl Voted {
    fn new(seed: u64) -> Voted {
        let begin = Begin { durable: BEGINS, pieced: BEGINS, ..at(1, 2) };
        let receiver = Receiver::new(segments(), begin, None).as_voter();
        let random = Random(seed);
        Voted {
            receiver,
            random,
            place: Place::default(),
            calls: Vec::new(),
            answers: Vec::new(),
            listed: None,
        }
    }

    fn begin(&mut self) -> Result<(), String> {
        let before = self.under_way();
        if let Some((ticket, object)) = self.receiver.next_put() {
            self.calls.push(Call::Put(Some(ticket), span(&object)));
        }
        if let Some(question) = self.receiver.next_question() {
            self.calls.push(Call::Ask(question));
        }
        match self.under_way() {
            0 | 1 => Ok(()),
            more => Err(format!("{more} calls are under way, of which {before} were before")),
        }
    }

    /// What the receiver waits for; puts that it has given up are not.
    fn under_way(&self) -> usize {
        let waited = |call: &&Call| !matches!(call, Call::Put(None, _));
        self.calls.iter().filter(waited).count() + self.answers.len()
    }

    fn one_of<T>(random: &mut Random, all: &mut Vec<T>) -> Option<T> {
        (!all.is_empty()).then(|| all.swap_remove(random.below(all.len() as u64) as usize))
    }

    /// A call arrives; the answer may be lost.
    fn arrives(&mut self) {
        let Some(call) = Voted::one_of(&mut self.random, &mut self.calls) else { return };
        let is_lost = self.random.below(4) == 0;
        match call {
            Call::Put(ticket, span) => {
                self.place.spans.push(span);
                self.answers.extend(ticket.map(|ticket| Told::Put(ticket, !is_lost)));
            }
            Call::Ask(question) => {
                let said = if self.place.is_sealed { Answer::Sealed } else { Answer::NotSealed };
                self.answers.push(Told::Answer(question, if is_lost { Answer::Lost } else { said }));
            }
        }
    }

    /// The owner waits no longer; a put may be carried out yet.
    fn given_up(&mut self) {
        match Voted::one_of(&mut self.random, &mut self.calls) {
            Some(Call::Put(ticket, span)) => {
                self.answers.extend(ticket.map(|ticket| Told::Put(ticket, false)));
                self.calls.push(Call::Put(None, span));
            }
            Some(Call::Ask(question)) => self.answers.push(Told::Answer(question, Answer::Lost)),
            None => {}
        }
    }

    fn hears(&mut self) {
        match Voted::one_of(&mut self.random, &mut self.answers) {
            Some(Told::Put(ticket, true)) => self.receiver.put(ticket),
            Some(Told::Put(ticket, false)) => self.receiver.put_failed(ticket),
            Some(Told::Answer(question, answer)) => self.receiver.answered(question, answer),
            None => {}
        }
    }

    fn receives(&mut self) {
        let position = self.receiver.position();
        let most = if self.random.below(40) == 0 { SEG * 3 / 2 } else { 9_000 };
        let bytes = (1 + self.random.below(most)).min(LAST.0 - position.0);
        self.receiver.receive(position, &vec![1; bytes as usize]).unwrap();
    }
}

/// One story, in which it is sealed at some time if that is wanted. Says up to where was told.
fn told(seed: u64, is_sealed: bool) -> Result<Lsn, String> {
    let mut story = Voted::new(seed);
    let seals_at = story.random.below(300);
    for step in 0..50_000 {
        story.receiver.tick(Instant::from_boot(Duration::from_millis(step)));
        match story.random.below(16) {
            0..5 => story.begin()?,
            5..8 => story.arrives(),
            8 => story.given_up(),
            9..12 => story.hears(),
            12..15 => story.receives(),
            // First the seal, and some time after that it is listed.
            _ if is_sealed && step > seals_at && !story.place.is_sealed => story.place.is_sealed = true,
            _ if story.place.is_sealed && story.listed.is_none() => story.listed = Some(story.place.end()),
            _ => {}
        }
        let told = story.receiver.durable();
        if told > story.place.end() {
            return Err(format!("{told} was told, and is not there"));
        }
        if let Some(listed) = story.listed.filter(|listed| told > *listed) {
            return Err(format!("{told} was told, and the vote says {listed}"));
        }
        if story.listed.is_some() && (story.receiver.is_sealed() || told == LAST) {
            let goes_on = story.receiver.next_put().is_some() || story.receiver.next_question().is_some();
            if story.receiver.is_sealed() && goes_on {
                return Err("it goes on behind a seal".to_owned());
            }
            return Ok(told);
        }
        if !is_sealed && told == LAST {
            return Ok(told);
        }
    }
    Err(format!("it does not come to an end: {:?}", story.receiver))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn what_was_told_is_in_every_vote(seed in any::<u64>()) {
        told(seed, true).map_err(TestCaseError::fail)?;
        prop_assert_eq!(told(seed, false), Ok(LAST));
    }
}

#[test]
fn a_report_before_the_answer_is_caught() {
    let failed = || (0..60).filter(|seed| told(*seed, true).is_err()).count();
    assert_eq!(failed(), 0);
    let caught = breaking(Some(Broken::ReportBeforeQuestion), failed);
    assert!(caught > 3, "of 60 stories {caught} are caught");
}

#[test]
fn nothing_is_told_before_the_first_answer_and_both_are_done_again_after_a_lost_one() {
    let begin = Begin { durable: BEGINS, pieced: BEGINS, ..at(1, 2) };
    let mut receiver = Receiver::new(segments(), begin, None).as_voter();
    receiver.receive(Lsn(2 * SEG), &vec![1; 80_000]).unwrap();
    receiver.tick(Instant::from_boot(Duration::ZERO));
    assert_eq!(
        (puts(&mut receiver), receiver.durable()),
        (Vec::new(), Lsn::ZERO),
        "it has to be asked first"
    );
    let first = receiver.next_question().unwrap();
    assert_eq!(receiver.next_question(), None);
    receiver.answered(first, Answer::Lost);
    let second = receiver.next_question().unwrap();
    receiver.answered(first, Answer::NotSealed);
    assert_eq!(receiver.durable(), Lsn::ZERO, "that was answered too late");
    receiver.answered(second, Answer::NotSealed);
    assert_eq!(receiver.durable(), BEGINS, "what was there is told by the question alone");

    let [(ticket, piece)] = &puts(&mut receiver)[..] else { panic!() };
    assert_eq!(span(piece), (BEGINS, Lsn(2 * SEG + 80_000)));
    receiver.put(*ticket);
    assert_eq!(receiver.durable(), BEGINS, "it was not asked yet");
    let question = receiver.next_question().unwrap();
    receiver.answered(question, Answer::Lost);
    assert_eq!(receiver.next_question(), None, "the piece comes first");
    let [(again, same)] = &puts(&mut receiver)[..] else { panic!() };
    assert_eq!((again, same), (ticket, piece));
    receiver.put(*again);
    let question = receiver.next_question().unwrap();
    receiver.answered(question, Answer::NotSealed);
    assert_eq!(receiver.durable(), Lsn(2 * SEG + 80_000));
}

#[test]
fn it_stays_on_its_timeline() {
    let mut receiver = Receiver::new(segments(), at(1, 2), None).as_voter();
    receiver.receive(Lsn(2 * SEG), &[7; 500]).unwrap();
    let fork = Lsn(2 * SEG + 500);
    let (_, file) = history(2, &[(1, fork.0)]);
    let left = receiver.end_timeline(Timeline(2), fork, file).unwrap_err();
    assert_eq!(left, ReceiveError::Left { timeline: Timeline(1), next: Timeline(2) });
}
