package dmutex_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/memory"
	"github.com/dchannel/dchannel/dmutex"
)

func Example() {
	b := memory.New()
	defer b.Close()
	m := dmutex.New("report:daily", 30*time.Second, b)
	defer m.Close()

	if err := m.Lock(); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("at work")
	if err := m.Unlock(); err != nil { // ErrLockExpired, say: somebody else may have been at it too
		fmt.Println(err)
	}
	// Output: at work
}

// Who does not get the lock learns who has it, and waits for that one's end.
func ExampleMutex_TryLock() {
	store := memory.NewStore()
	b1, b2 := store.Backend(), store.Backend() // two processes
	defer b1.Close()
	defer b2.Close()
	first := dmutex.New("k", time.Minute, b1, dmutex.WithInfo("host 1"))
	second := dmutex.New("k", time.Minute, b2, dmutex.WithInfo("host 2"))
	defer first.Close()
	defer second.Close()

	fmt.Println("first:", first.TryLock())
	err := second.TryLock()
	var held *dchannel.LockedError
	if errors.As(err, &held) {
		fmt.Println("second: it is held by", held.Info)
	}
	if err := first.Unlock(); err != nil {
		fmt.Println(err)
	}
	expired, err := second.WaitUntilUnlocked(context.Background())
	fmt.Println("second: expired:", expired, err)
	// Output:
	// first: <nil>
	// second: it is held by host 1
	// second: expired: false <nil>
}

// Ten workers need a token that is not there. One fetches it.
func ExampleDo() {
	b := memory.New()
	defer b.Close()
	m := dmutex.New("token:refresh", 10*time.Second, b, dmutex.WithAutoExtend())
	defer m.Close()

	var cache sync.Map // a shared one, in real life
	read := func(context.Context) (string, bool, error) {
		v, ok := cache.Load("token")
		if !ok {
			return "", false, nil
		}
		return v.(string), true, nil
	}
	refresh := func(_ context.Context, _ uint64) (string, error) {
		fmt.Println("fetching a token")
		cache.Store("token", "secret")
		return "secret", nil
	}
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			if v, err := dmutex.Do(context.Background(), m, read, refresh); v != "secret" || err != nil {
				fmt.Println("unexpected:", v, err)
			}
		})
	}
	wg.Wait()
	// Output: fetching a token
}

// account is a storage that knows fences.
type account struct {
	mu      sync.Mutex
	fence   uint64
	balance int
}

func (a *account) show(fence uint64) error {
	if fence < a.fence {
		return fmt.Errorf("fence %d is too old", fence)
	}
	a.fence = fence
	return nil
}

// Read notes the fence: nobody with a lower one can write from here on.
func (a *account) Read(fence uint64) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.balance, a.show(fence)
}

func (a *account) Write(fence uint64, balance int) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.show(fence); err != nil {
		return err
	}
	a.balance = balance
	return nil
}

// A holder stands still for longer than its lock lasts. The storage refuses what it
// writes afterwards, so no deposit is lost.
func ExampleMutex_Fence() {
	store := memory.NewStore()
	b := store.Backend()
	defer b.Close()
	slow, quick := dmutex.New("account", time.Minute, b), dmutex.New("account", time.Minute, b)
	defer slow.Close()
	defer quick.Close()
	acc := &account{balance: 7}

	fmt.Println("slow locks:", slow.Lock())
	seen, err := acc.Read(slow.Fence())
	fmt.Println("slow reads:", seen, err)
	store.ExpireLock("account") // a long pause, in real life

	fmt.Println("quick locks:", quick.Lock())
	now, err := acc.Read(quick.Fence())
	fmt.Println("quick reads:", now, err)
	fmt.Println("quick adds 1:", acc.Write(quick.Fence(), now+1))
	fmt.Println("quick unlocks:", quick.Unlock())

	err = acc.Write(slow.Fence(), seen+1)
	fmt.Println("slow is refused:", err != nil)
	fmt.Println("slow has lost its lock:", errors.Is(slow.Unlock(), dchannel.ErrLockLost))
	fmt.Println("balance:", acc.balance)
	// Output:
	// slow locks: <nil>
	// slow reads: 7 <nil>
	// quick locks: <nil>
	// quick reads: 7 <nil>
	// quick adds 1: <nil>
	// quick unlocks: <nil>
	// slow is refused: true
	// slow has lost its lock: true
	// balance: 8
}
