package etcd

import (
	"sync"

	"github.com/dchannel/dchannel"
)

// tails holds what this process believes the heads of channels to be. A belief may be wrong: it is the
// condition of an append, never an answer.
type tails struct {
	mu     sync.Mutex
	of     map[string]*belief
	floors map[dchannel.ID]floor
}

// maxBeliefs bounds the beliefs nobody holds. What is dropped costs one conflict.
const maxBeliefs = 16384

type belief struct {
	turn  chan struct{} // held by the append under way
	head  tail
	known bool
	users int
}

// floor is where a frame whose append failed was going to: it is in the log above it, or not at
// all.
type floor struct {
	dchannel.Position
	sent bool
}

// maxFloors bounds the floors, of frames that nobody came back for. Without one a retry searches
// the whole log.
const maxFloors = 4096

func (t *tails) init() {
	t.of = make(map[string]*belief)
	t.floors = make(map[dchannel.ID]floor)
}

func (t *tails) hold(name string) *belief {
	t.mu.Lock()
	defer t.mu.Unlock()
	c := t.of[name]
	if c == nil {
		c = &belief{turn: make(chan struct{}, 1)}
		t.of[name] = c
	}
	c.users++
	return c
}

func (t *tails) release(c *belief) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c.users--
	if len(t.of) <= maxBeliefs {
		return
	}
	for name, c := range t.of { // any will do: a map begins at a random place
		if c.users == 0 {
			delete(t.of, name)
			return
		}
	}
}

// get returns the belief; without one, that there is no log.
func (t *tails) get(c *belief) tail {
	t.mu.Lock()
	defer t.mu.Unlock()
	return c.head
}

// set replaces the belief; nil for nothing known.
func (t *tails) set(c *belief, head *tail) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c.known = head != nil; c.known {
		c.head = *head
	} else {
		c.head = tail{}
	}
}

// pushed takes an entry that the watch brought: someone else appended it, perhaps.
func (t *tails) pushed(name []byte, e dchannel.Entry) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c := t.of[string(name)]; c != nil && c.known && c.head.Epoch == e.Epoch && c.head.Seq < e.Seq {
		c.head = tailOf(e)
	}
}

// forget drops one channel's belief, or all without a name.
func (t *tails) forget(names ...string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(names) == 0 {
		for _, c := range t.of {
			c.head, c.known = tail{}, false
		}
	}
	for _, n := range names {
		if c := t.of[n]; c != nil {
			c.head, c.known = tail{}, false
		}
	}
}

// remember notes where id was going to. The first floor of a frame that may have been sent stays: a later attempt
// does not make an earlier one undone.
func (t *tails) remember(id dchannel.ID, f floor) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.floors[id].sent {
		return
	}
	if len(t.floors) >= maxFloors {
		for old := range t.floors {
			delete(t.floors, old)
			break
		}
	}
	t.floors[id] = f
}

func (t *tails) floor(id dchannel.ID) (f floor, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	f, ok = t.floors[id]
	return f, ok
}

func (t *tails) settled(id dchannel.ID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.floors, id)
}
