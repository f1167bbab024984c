// Asks the server, and shows its sentences as they come.

async function ask(path, content) {
  let response;
  try {
    response = await fetch(path, content === undefined ? {} : {
      method: 'POST', body: JSON.stringify(content),
      headers: { 'Content-Type': 'application/json' },
    });
  } catch {
    throw new Error('The server does not answer; is topk-explorer still running?');
  }
  const unreadable = { error: `The server answered with status ${response.status}.` };
  const answer = await response.json().catch(() => unreadable);
  if (!response.ok) throw new Error(answer.error || unreadable.error);
  return answer;
}

// Shows an error in its place; null clears the place.
function say(id, error) {
  const text = error ? error.message : '';
  byId(id).textContent = text ? text[0].toUpperCase() + text.slice(1) : '';
}
