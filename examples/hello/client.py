"""Call it, cast to it, and see what an error looks like from here."""

from zmqcore import Client, RemoteError

greeter = Client("greeter", timeout=2.0)

print(greeter.call("greet", "Ada"))
print(greeter.call("greet", name="Grace"))

greeter.cast("leave", "Ada")  # returns at once; nobody tells what became of it
print(greeter.call("greet", "Edsger"))

try:
    greeter.call("leave", "Alan")
except RemoteError as exc:
    print("refused:", exc.type, exc.message)
