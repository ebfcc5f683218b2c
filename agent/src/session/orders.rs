//! What the leader asks about images. Each order is a task that ends with the session; what it has begun goes on, and the next
//! leader that asks for the same finds it.

use std::{sync::Mutex, time::Duration};

use tokio::{sync::mpsc, time};
use uncloud_proto::{
    ids::ImageId,
    v1::{self, SessionRequest, session_request::Message},
};

use crate::storage::images::Images;

/// How often the leader hears how far a fetch is, also when nothing comes.
const EVERY: Duration = Duration::from_secs(1);

async fn send(messages: &mpsc::Sender<SessionRequest>, message: Message) {
    // The session may have ended meanwhile; then nobody waits for the answer.
    let _ = messages.send(SessionRequest { message: Some(message) }).await;
}

/// Fetches an image, and says how far it is.
pub(super) async fn fetch(images: Images, question: v1::FetchImage, messages: mpsc::Sender<SessionRequest>) {
    let query_id = question.query_id;
    let image = question.image.unwrap_or_default();
    let known = Mutex::new((0, 0));
    let work = images.first_fetch(&image, |done, total| *known.lock().expect("it is held for moments") = (done, total));
    let telling = async {
        let mut ticker = time::interval(EVERY);
        loop {
            ticker.tick().await;
            let (done_bytes, total_bytes) = *known.lock().expect("it is held for moments");
            send(&messages, Message::FetchProgress(v1::FetchProgress { query_id, done_bytes, total_bytes })).await;
        }
    };
    let answer = tokio::select! {
        answer = work => match answer {
            Ok(files) => v1::ImageFetched { query_id, files, problem: None },
            Err(error) => {
                let problem = v1::FileProblem { kind: error.kind.into(), message: error.message };
                v1::ImageFetched { query_id, files: Vec::new(), problem: Some(problem) }
            }
        },
        never = telling => never,
    };
    send(&messages, Message::ImageFetched(answer)).await;
}

/// Removes the copies of an image.
pub(super) async fn remove(images: Images, question: v1::RemoveImage, messages: mpsc::Sender<SessionRequest>) {
    let problem = match question.image_id.parse::<ImageId>() {
        Ok(image) => images.remove(image).await.err().unwrap_or_default(),
        Err(e) => format!("image_id: {e}"),
    };
    send(&messages, Message::ImageRemoved(v1::ImageRemoved { query_id: question.query_id, problem })).await;
}
