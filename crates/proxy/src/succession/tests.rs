//! Each step of a handover, with one side of it played by the test, which goes away there.

use std::net::Ipv4Addr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::*;
use crate::hba::Hba;
use crate::{AuthQuery, Config, InClear, Settings};

const SOON: Duration = Duration::from_secs(20);

fn config(workers: u16) -> Config {
    Config {
        listen: vec![((Ipv4Addr::LOCALHOST, 0).into(), Access::ReadWrite)],
        workers,
        server_tls: Arc::new(InClear),
        auth_query: AuthQuery {
            user: "pgherd_proxy".to_owned(),
            database: "postgres".to_owned(),
            secret_of: None,
        },
    }
}

fn settings() -> Settings {
    Settings::new(Hba::default())
}

struct Scene {
    _base: tempfile::TempDir,
    path: PathBuf,
}

impl Scene {
    fn new() -> Scene {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("run");
        Scene { _base: base, path }
    }

    fn place(&self) -> Place {
        Place::open(&self.path).unwrap()
    }

    async fn turn(&self) -> Turn {
        Turn::wait(self.place()).await.unwrap()
    }

    /// A process that accepts, with something beside its listeners.
    async fn accepting(&self) -> (Arc<Proxy>, Succession) {
        let proxy = Arc::new(Proxy::start(config(2), settings()).unwrap());
        let other = std::fs::File::open("/dev/null").unwrap().into();
        let others = vec![("metrics".to_owned(), other)];
        let succession = Succession::begin(self.turn().await, None, &proxy, others, None).await.unwrap();
        (proxy, succession)
    }

    /// Asks the one process that accepts.
    async fn talk(&self) -> Link {
        let found = self.place().answering().await.unwrap();
        let (name, _) = found.iter().find(|(_, found)| found.accepts).expect("one accepts");
        self.place().connect(name).unwrap()
    }
}

async fn hear(link: &Link) -> Option<Word> {
    timeout(SOON, link.receive()).await.unwrap().unwrap().map(|(word, _)| word)
}

/// Everything up to and with the last listener.
async fn listeners(link: &Link) -> Vec<Word> {
    let mut heard = Vec::new();
    loop {
        match hear(link).await.unwrap() {
            Word::All => return heard,
            word => heard.push(word),
        }
    }
}

/// Somebody lets clients in there, within some time.
async fn lets_in(address: SocketAddr) -> bool {
    let asked = async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(&[0, 0, 0, 8, 4, 210, 22, 47]).await.unwrap();
        let mut answer = [0];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"N", "there is no TLS");
    };
    timeout(Duration::from_millis(300), asked).await.is_ok()
}

#[tokio::test]
async fn wherever_a_successor_goes_the_former_process_goes_on() {
    let scene = Scene::new();
    let (proxy, succession) = scene.accepting().await;
    let address = proxy.addresses()[0];
    assert!(lets_in(address).await);
    for last in 0..4 {
        let link = scene.talk().await;
        if last > 0 {
            link.send(&Word::Hello { version: VERSION }).await.unwrap();
            let heard = listeners(&link).await;
            let expected = Word::Listener { access: Access::ReadWrite, address };
            assert_eq!(heard, [expected.clone(), expected, Word::Other { name: "metrics".to_owned() }]);
        }
        if last > 1 {
            assert!(lets_in(address).await, "as long as the other one is not ready");
            link.send(&Word::Ready).await.unwrap();
            assert_eq!(hear(&link).await, Some(Word::Yours));
            assert!(!lets_in(address).await, "it is the other one's now");
        }
        if last > 2 {
            link.send(&Word::Serving { clients_within: None }).await.unwrap();
            let mut standing = succession.standing();
            timeout(SOON, standing.wait_for(|now| *now == Standing::Aside)).await.unwrap().unwrap();
            assert!(!lets_in(address).await);
        }
        drop(link);
        let back = async { while !lets_in(address).await {} };
        timeout(SOON, back).await.unwrap_or_else(|_| panic!("nobody accepts after step {last}"));
        let mut standing = succession.standing();
        timeout(SOON, standing.wait_for(|now| *now == Standing::Accepts)).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn who_is_not_understood_or_not_the_first_is_refused_with_a_reason() {
    let scene = Scene::new();
    let (proxy, succession) = scene.accepting().await;
    let says = async |words: &[Word]| {
        let link = scene.talk().await;
        for word in words {
            link.send(word).await.unwrap();
        }
        match hear(&link).await {
            Some(Word::Refused { why }) => why,
            other => panic!("{other:?}"),
        }
    };
    let why = says(&[Word::Hello { version: VERSION + 1 }]).await;
    assert_eq!(why, "it speaks version 1 of the handover, and the successor version 2");
    assert_eq!(says(&[Word::Yours]).await, "nobody begins with \"yours\"");

    let first = scene.talk().await;
    first.send(&Word::Hello { version: VERSION }).await.unwrap();
    listeners(&first).await;
    assert_eq!(says(&[Word::Hello { version: VERSION }]).await, "another successor is before this one");
    // One that gets the order wrong.
    first.send(&Word::Serving { clients_within: None }).await.unwrap();
    assert!(matches!(hear(&first).await, Some(Word::Refused { .. })));
    assert!(lets_in(proxy.addresses()[0]).await);

    // One that comes while the process is about to end.
    let late = scene.talk().await;
    late.send(&Word::Hello { version: VERSION }).await.unwrap();
    listeners(&late).await;
    succession.leave().await;
    assert_eq!(hear(&late).await, Some(Word::Refused { why: "it was asked to end".to_owned() }));
}

#[tokio::test]
async fn a_process_with_a_successor_ends_with_its_last_client_and_no_later_than_it_is_told() {
    let scene = Scene::new();
    let (proxy, succession) = scene.accepting().await;
    let mut stays = TcpStream::connect(proxy.addresses()[0]).await.unwrap();
    while proxy.guests() == 0 {
        tokio::task::yield_now().await;
    }
    let turn = scene.turn().await;
    let mut heritage = turn.inherit().await.unwrap();
    assert!(heritage.take("metrics").is_some() && heritage.take("metrics").is_none());
    let inherited = std::mem::take(&mut heritage.listeners);
    let next = Arc::new(Proxy::succeed(config(2), settings(), inherited).unwrap());
    assert_eq!(next.addresses(), proxy.addresses());
    let within = Some(Duration::from_millis(50));
    let next_one = Succession::begin(turn, Some(heritage), &next, Vec::new(), within).await.unwrap();
    let found = scene.place().processes().await.unwrap();
    assert_eq!(found.iter().filter(|found| found.accepts).count(), 1, "{found:?}");
    assert!(lets_in(next.addresses()[0]).await && next.guests() <= 1);
    // So that the former one need not wait for a death.
    next_one.leave().await;
    let mut standing = succession.standing();
    timeout(SOON, standing.wait_for(|now| *now == Standing::Over)).await.unwrap().unwrap();
    // It had not said who it is, and so nothing was said to it.
    drop(succession);
    drop(proxy);
    assert_eq!(timeout(SOON, stays.read(&mut [0])).await.unwrap().unwrap_or(0), 0);
    assert!(lets_in(next.addresses()[0]).await);
}

/// Stands for a former process: says so much, and goes.
async fn former(socket: UnixListener, address: SocketAddr, listener: TcpListener, says: Vec<Word>) {
    loop {
        let (stream, _) = socket.accept().await.unwrap();
        let link = Link::from(stream);
        match hear(&link).await {
            Some(Word::Status) => link.send(&Word::State { accepts: true, clients: 0 }).await.unwrap(),
            Some(Word::Hello { version: VERSION }) => {
                let word = Word::Listener { access: Access::ReadWrite, address };
                link.send_with(&word, Some(listener.as_fd())).await.unwrap();
                link.send(&Word::All).await.unwrap();
                drop(listener);
                if !says.is_empty() {
                    assert_eq!(hear(&link).await, Some(Word::Ready));
                }
                for word in says {
                    link.send(&word).await.unwrap();
                }
                return;
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn wherever_a_former_process_goes_its_successor_has_the_clients_that_wait() {
    for says in [vec![], vec![Word::Yours]] {
        let scene = Scene::new();
        let (socket, own) = scene.place().listen().unwrap();
        let socket = UnixListener::from_std(socket.into()).unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let former = tokio::spawn(former(socket, address, listener, says));
        let turn = scene.turn().await;
        let mut heritage = turn.inherit().await.unwrap();
        let waits = tokio::spawn(async move {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(&[0, 0, 0, 8, 4, 210, 22, 47]).await.unwrap();
            stream.read_u8().await.unwrap()
        });
        // One listener, and more workers than that.
        let inherited = std::mem::take(&mut heritage.listeners);
        let proxy = Arc::new(Proxy::succeed(config(3), settings(), inherited).unwrap());
        let succession = Succession::begin(turn, Some(heritage), &proxy, Vec::new(), None).await.unwrap();
        former.await.unwrap();
        assert_eq!(timeout(SOON, waits).await.unwrap().unwrap(), b'N');
        assert_eq!(*succession.standing().borrow(), Standing::Accepts);
        for _ in 0..20 {
            assert!(lets_in(address).await);
        }
        drop(own);
    }
}

#[tokio::test]
async fn a_successor_that_is_refused_accepts_nobody() {
    let scene = Scene::new();
    let (socket, _own) = scene.place().listen().unwrap();
    let socket = UnixListener::from_std(socket.into()).unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let kept = listener.try_clone().unwrap();
    let says = vec![Word::Refused { why: "it is Tuesday".to_owned() }];
    let former = tokio::spawn(former(socket, address, listener, says));
    let turn = scene.turn().await;
    let mut heritage = turn.inherit().await.unwrap();
    let inherited = std::mem::take(&mut heritage.listeners);
    let proxy = Arc::new(Proxy::succeed(config(1), settings(), inherited).unwrap());
    let refused = Succession::begin(turn, Some(heritage), &proxy, Vec::new(), None).await;
    assert!(matches!(refused, Err(SuccessionError::Refused { why, .. }) if why == "it is Tuesday"));
    former.await.unwrap();
    assert!(!lets_in(address).await);
    drop((proxy, kept));
}

#[tokio::test]
async fn fewer_workers_let_in_whoever_waits_at_any_listener() {
    let scene = Scene::new();
    let many = Arc::new(Proxy::start(config(6), settings()).unwrap());
    let first = Succession::begin(scene.turn().await, None, &many, Vec::new(), None).await.unwrap();
    let turn = scene.turn().await;
    let mut heritage = turn.inherit().await.unwrap();
    let inherited = std::mem::take(&mut heritage.listeners);
    assert_eq!(inherited.len(), 6);
    let one = Arc::new(Proxy::succeed(config(1), settings(), inherited).unwrap());
    let second = Succession::begin(turn, Some(heritage), &one, Vec::new(), None).await.unwrap();
    for _ in 0..60 {
        assert!(lets_in(one.addresses()[0]).await, "the kernel spreads them over all listeners");
    }
    assert_eq!(many.guests(), 0);
    drop((first, second));
}
